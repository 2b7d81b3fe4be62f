/* Products in groups of 64, by AVX2: a group's numbers are two registers of 32 bytes; bytes are multiplied in pairs, whose
 * sums 16 bits must hold, so numbers of more than 6 bits are taken apart. */
#include <immintrin.h>

#define VECTORS 1
#define AT_ONCE 4 /* rows, so that x is loaded once for all */

/* elements 0 to 31 and 32 to 63 of a group's pairs of bits */
static inline void pairs(const uint8_t *c, __m256i *low, __m256i *high) {
    const __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)c)), three = _mm256_set1_epi8(3);
    *low = _mm256_and_si256(_mm256_srlv_epi32(both, _mm256_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2)), three);
    *high = _mm256_and_si256(_mm256_srlv_epi32(both, _mm256_setr_epi32(4, 4, 4, 4, 6, 6, 6, 6)), three);
}

static inline void nibbles(const uint8_t *c, __m256i *low, __m256i *high) {
    const __m256i both = _mm256_loadu_si256((const __m256i *)c), fifteen = _mm256_set1_epi8(15);
    *low = _mm256_and_si256(both, fifteen);
    *high = _mm256_and_si256(_mm256_srli_epi16(both, 4), fifteen);
}

static inline __m256i each_bit(const uint8_t *c) { /* 32 bits of 4 bytes */
    int32_t word;
    memcpy(&word, c, 4);
    const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(word), _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303));
    const __m256i bit = _mm256_set1_epi64x((int64_t)0x8040201008040201);
    return _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit), _mm256_set1_epi8(1));
}

static inline void threes(const uint8_t *c, __m256i *low, __m256i *high) {
    pairs(c, low, high);
    *low = _mm256_or_si256(_mm256_add_epi8(*low, *low), each_bit(c + 16));
    *high = _mm256_or_si256(_mm256_add_epi8(*high, *high), each_bit(c + 20));
}

static inline void codes(const planes *p, int64_t row, int bits, int64_t g, __m256i *low, __m256i *high) {
    const uint8_t *c = base_of(p, row, bits, g);
    if (bits & 1) threes(c, low, high);
    else nibbles(c, low, high);
}

static inline __m256i times4(__m256i small) { return _mm256_slli_epi16(small, 2); } /* bytes below 64 */

static inline __attribute__((always_inline)) void numbers_to(const planes *p, int64_t row, int bits, int64_t g, uint8_t *to) {
    __m256i low, high, a, b;
    codes(p, row, bits, g, &low, &high);
    for (int plane = 0; plane < (bits >= 7 ? 2 : bits >= 5); plane++) {
        pairs(pairs_of(plane ? p->finest : p->fine, p, row, g), &a, &b);
        low = _mm256_or_si256(times4(low), a), high = _mm256_or_si256(times4(high), b);
    }
    _mm256_storeu_si256((__m256i *)to, low), _mm256_storeu_si256((__m256i *)(to + 32), high);
}

/* sums of neighbours of (numbers of a group of 64) * (codes of x), eight int32 */
static inline __attribute__((always_inline)) __m256i group_dot(const planes *p, int64_t row, int bits, int64_t g, __m256i x0, __m256i x1) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i low, high, a, b;
    codes(p, row, bits, g, &low, &high);
    if (bits >= 5) pairs(pairs_of(p->fine, p, row, g), &a, &b);
    if (bits < 7) {
        if (bits >= 5) low = _mm256_or_si256(times4(low), a), high = _mm256_or_si256(times4(high), b);
        return _mm256_madd_epi16(_mm256_add_epi16(_mm256_maddubs_epi16(low, x0), _mm256_maddubs_epi16(high, x1)), ones);
    }
    __m256i c, e;
    pairs(pairs_of(p->finest, p, row, g), &c, &e);
    a = _mm256_or_si256(times4(a), c), b = _mm256_or_si256(times4(b), e);
    const __m256i top = _mm256_add_epi16(_mm256_maddubs_epi16(low, x0), _mm256_maddubs_epi16(high, x1));
    const __m256i rest = _mm256_add_epi16(_mm256_maddubs_epi16(a, x0), _mm256_maddubs_epi16(b, x1));
    return _mm256_add_epi32(_mm256_madd_epi16(top, _mm256_set1_epi16(16)), _mm256_madd_epi16(rest, ones));
}

static inline float across(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

static inline void fetch(const planes *p, int64_t row, int bits, int64_t g) {
    __builtin_prefetch(base_of(p, row, bits, g));
    if (bits >= 5) __builtin_prefetch(pairs_of(p->fine, p, row, g));
    if (bits >= 7) __builtin_prefetch(pairs_of(p->finest, p, row, g));
}

/* four rows at once, so that x is loaded once for all; `next` are fetched meanwhile */
static inline __attribute__((always_inline)) void dots(const planes *p, const int64_t *row, const int64_t *next, int bits,
                                                       const rounded *x, float *out) {
    const int64_t groups = p->d / 64;
    __m256 sum[AT_ONCE], offset[AT_ONCE];
    for (int r = 0; r < AT_ONCE; r++) sum[r] = offset[r] = _mm256_setzero_ps();
    for (int64_t g = 0; g < groups; g += 8) {
        const int64_t n = groups - g < 8 ? groups - g : 8;
        float scaled[AT_ONCE][8];
        for (int r = 0; r < AT_ONCE; r++) {
            __builtin_prefetch(p->scale + next[r] * groups + g);
            const uint16_t *s = p->scale + row[r] * groups + g;
            __m128i eight;
            if (n == 8) eight = _mm_loadu_si128((const __m128i *)s);
            else {
                uint16_t part[8] = {0};
                memcpy(part, s, n * 2);
                eight = _mm_loadu_si128((const __m128i *)part);
            }
            const __m256 scale = _mm256_cvtph_ps(eight);
            offset[r] = _mm256_fmadd_ps(scale, _mm256_loadu_ps(x->total + g), offset[r]);
            _mm256_storeu_ps(scaled[r], _mm256_mul_ps(scale, _mm256_loadu_ps(x->step + g)));
        }
        for (int64_t i = 0; i < n; i++) {
            const __m256i x0 = _mm256_loadu_si256((const __m256i *)(x->code + (g + i) * 64));
            const __m256i x1 = _mm256_loadu_si256((const __m256i *)(x->code + (g + i) * 64 + 32));
            for (int r = 0; r < AT_ONCE; r++) {
                if (!((g + i) & 1)) fetch(p, next[r], bits, g + i);
                const __m256 part = _mm256_cvtepi32_ps(group_dot(p, row[r], bits, g + i, x0, x1));
                sum[r] = _mm256_fmadd_ps(_mm256_set1_ps(scaled[r][i]), part, sum[r]);
            }
        }
    }
    for (int r = 0; r < AT_ONCE; r++) out[r] = (across(sum[r]) - middle_of(p, bits) * across(offset[r])) / cells(bits);
}

/* which small numbers of a row: its codes of 3 or 4 bits, the pairs of `fine`, those of `fine` and `finest` as one nibble */
enum { QUARTERS = 1, SIXTEENTHS = 2, THREES = 3, NIBBLES = 4 };
static const float CENTRE[] = {[QUARTERS] = 1.5f, [SIXTEENTHS] = 7.5f, [THREES] = 4.0f, [NIBBLES] = 8.0f};

static inline void small_numbers(const planes *p, int64_t row, int kind, int64_t g, __m256i *low, __m256i *high) {
    if (kind >= THREES) return codes(p, row, kind, g, low, high);
    pairs(pairs_of(p->fine, p, row, g), low, high);
    if (kind == QUARTERS) return;
    __m256i a, b;
    pairs(pairs_of(p->finest, p, row, g), &a, &b);
    *low = _mm256_or_si256(times4(*low), a), *high = _mm256_or_si256(times4(*high), b);
}

/* Factors of TILE rows for the eight groups from g on, in 8 bits: word[q] holds those of rows 4 q to 4 q + 3 for each group,
 * step their unit, total their sum; what they leave over goes back into f. */
static inline void round_factors(__m256 f[TILE], __m256i word[TILE / 4], __m256 *step, __m256 *total) {
    const __m256 positive = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    __m256 most = _mm256_setzero_ps();
    for (int r = 0; r < TILE; r++) most = _mm256_max_ps(most, _mm256_and_ps(f[r], positive));
    *step = _mm256_mul_ps(most, _mm256_set1_ps(1.0f / 127));
    const __m256 some = _mm256_cmp_ps(most, _mm256_setzero_ps(), _CMP_GT_OQ);
    const __m256 inverse = _mm256_and_ps(some, _mm256_div_ps(_mm256_set1_ps(127), most));
    __m256i sum = _mm256_setzero_si256();
    for (int q = 0; q < TILE / 4; q++) {
        word[q] = _mm256_setzero_si256();
        for (int r = 0; r < 4; r++) {
            const __m256i code = _mm256_cvtps_epi32(_mm256_mul_ps(f[4 * q + r], inverse));
            f[4 * q + r] = _mm256_fnmadd_ps(_mm256_cvtepi32_ps(code), *step, f[4 * q + r]);
            sum = _mm256_add_epi32(sum, code);
            word[q] = _mm256_or_si256(word[q], _mm256_slli_epi32(_mm256_and_si256(code, _mm256_set1_epi32(255)), 8 * r));
        }
    }
    *total = _mm256_mul_ps(*step, _mm256_cvtepi32_ps(sum));
}

/* y[64] += step * sum over rows of factor * (small number - centre), of one group */
static inline __attribute__((always_inline)) void add_group(const planes *p, const int64_t *row, int kind, int64_t g,
                                                            const int32_t *word, float step, float total, float *y) {
    __m256i sum[4];
    for (int i = 0; i < 4; i++) sum[i] = _mm256_setzero_si256();
    for (int q = 0; q < TILE / 4; q++) {
        const __m256i four = _mm256_set1_epi32(word[q]);
        const __m256i two = _mm256_shuffle_epi8(four, _mm256_set1_epi16(0x0100));
        const __m256i more = _mm256_shuffle_epi8(four, _mm256_set1_epi16(0x0302));
        __m256i low[4], high[4];
        for (int r = 0; r < 4; r++) small_numbers(p, row[4 * q + r], kind, g, &low[r], &high[r]);
#define PAIR(unpack, part, a, b, by) _mm256_maddubs_epi16(unpack(part[a], part[b]), by)
#define BOTH(unpack, part) _mm256_add_epi16(PAIR(unpack, part, 0, 1, two), PAIR(unpack, part, 2, 3, more))
        sum[0] = _mm256_add_epi16(sum[0], BOTH(_mm256_unpacklo_epi8, low));
        sum[1] = _mm256_add_epi16(sum[1], BOTH(_mm256_unpackhi_epi8, low));
        sum[2] = _mm256_add_epi16(sum[2], BOTH(_mm256_unpacklo_epi8, high));
        sum[3] = _mm256_add_epi16(sum[3], BOTH(_mm256_unpackhi_epi8, high));
    }
    /* unpacked: the low lanes of sum[0] and sum[1] are elements 0 to 15, the high lanes 16 to 31; then 32 to 63 */
    const __m256 unit = _mm256_set1_ps(step), offset = _mm256_set1_ps(-CENTRE[kind] * total);
    for (int i = 0; i < 4; i++) {
        const int at = (i >> 1) * 32 + (i & 1) * 8;
        const __m256 a = _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm256_castsi256_si128(sum[i])));
        const __m256 b = _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm256_extracti128_si256(sum[i], 1)));
        float *first = y + at, *second = y + at + 16;
        _mm256_storeu_ps(first, _mm256_fmadd_ps(a, unit, _mm256_add_ps(_mm256_loadu_ps(first), offset)));
        _mm256_storeu_ps(second, _mm256_fmadd_ps(b, unit, _mm256_add_ps(_mm256_loadu_ps(second), offset)));
    }
}

static inline __attribute__((always_inline)) void add_pass(const planes *p, const int64_t *row, const int64_t *next, int kind,
                                                           int64_t g, int64_t n, __m256 f[TILE], float *y) {
    __m256i word[TILE / 4];
    __m256 step, total;
    round_factors(f, word, &step, &total);
    int32_t words[TILE / 4][8];
    float steps[8], totals[8];
    for (int q = 0; q < TILE / 4; q++) _mm256_storeu_si256((__m256i *)words[q], word[q]);
    _mm256_storeu_ps(steps, step), _mm256_storeu_ps(totals, total);
    for (int64_t i = 0; i < n; i++) {
        int32_t own[TILE / 4];
        for (int q = 0; q < TILE / 4; q++) own[q] = words[q][i];
        if (next && !(i & 1))
            for (int r = 0; r < TILE; r++) __builtin_prefetch(base_of(p, next[r], kind, g + i));
        add_group(p, row, kind, g + i, own, steps[i], totals[i], y + (g + i) * 64);
    }
}

static inline __attribute__((always_inline)) void add_tiles(const planes *p, int bits, int64_t first, const int64_t *index, const float *h, int64_t k, int64_t from,
                      int64_t to, float *y) {
    const int64_t groups = p->d / 64;
    for (int64_t j = 0; j < k; j += TILE) {
        int64_t row[TILE], next[TILE];
        float own[TILE];
        for (int r = 0; r < TILE; r++) {
            row[r] = first + index[j + r < k ? j + r : k - 1];
            next[r] = first + index[j + TILE + r < k ? j + TILE + r : k - 1];
            own[r] = j + r < k ? h[j + r] : 0;
        }
        for (int64_t g = from; g < to; g += 8) {
            const int64_t n = to - g < 8 ? to - g : 8;
            __m256 f[TILE], whole[TILE];
            for (int r = 0; r < TILE; r++) {
                uint16_t part[8] = {0};
                const uint16_t *s = p->scale + row[r] * groups + g;
                __builtin_prefetch(p->scale + next[r] * groups + g);
                if (n < 8) memcpy(part, s, n * 2);
                const __m128i eight = _mm_loadu_si128((const __m128i *)(n < 8 ? part : s));
                whole[r] = f[r] = _mm256_mul_ps(_mm256_cvtph_ps(eight), _mm256_set1_ps(own[r]));
            }
            const int base = bits & 1 ? THREES : NIBBLES;
            if (base == THREES) add_pass(p, row, next, THREES, g, n, f, y);
            else add_pass(p, row, next, NIBBLES, g, n, f, y);
            if (bits <= 4) continue;
            if (base == THREES) add_pass(p, row, 0, THREES, g, n, f, y); /* what 8 bits of the factors left over */
            else add_pass(p, row, 0, NIBBLES, g, n, f, y);
            for (int r = 0; r < TILE; r++) f[r] = _mm256_mul_ps(whole[r], _mm256_set1_ps(1.0f / cells(bits)));
            if (bits < 7) add_pass(p, row, 0, QUARTERS, g, n, f, y);
            else add_pass(p, row, 0, SIXTEENTHS, g, n, f, y);
        }
    }
}

