/* Products in groups of 64, by AVX-512 with VNNI: a group's numbers are the 64 bytes of one register. */
#include <immintrin.h>

#define VECTORS 1
#define AT_ONCE 4 /* rows of one vector, so that it is loaded once for all */
#define PAIR 2    /* rows of several vectors */
#define GROUPS 16 /* of columns, whose sums are kept at a time */
#define MOST_VECTORS 16
#define SUMS 4 /* tokens whose sums stay in registers */

static inline __m512i pairs64(const uint8_t *c) {
    const __m512i shifts = _mm512_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2, 4, 4, 4, 4, 6, 6, 6, 6);
    const __m512i all = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)c));
    return _mm512_and_si512(_mm512_srlv_epi32(all, shifts), _mm512_set1_epi8(3));
}

static inline __m512i nibbles64(const uint8_t *c) {
    const __m512i shifts = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 4, 4, 4, 4, 4, 4, 4, 4);
    const __m512i both = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)c));
    return _mm512_and_si512(_mm512_srlv_epi32(both, shifts), _mm512_set1_epi8(15));
}

static inline __m512i threes64(const uint8_t *c) {
    uint64_t last;
    memcpy(&last, c + 16, 8);
    return _mm512_or_si512(_mm512_slli_epi16(pairs64(c), 1), _mm512_maskz_set1_epi8(last, 1));
}

/* the place of a row's group, in steps of 8 weights, by which the planes are addressed */
static inline uint64_t place(const planes *p, int64_t row, int64_t g) { return (uint64_t)(row * p->d) / 8 + (uint64_t)g * 8; }

/* the numbers of a group; bits is known where this is compiled */
static inline __attribute__((always_inline)) __m512i numbers(const planes *p, uint64_t at, int bits) {
    const uint8_t *const base = p->base + base_bits(bits) * at;
    __m512i u = bits & 1 ? threes64(base) : nibbles64(base);
    if (bits < 5) return u;
    const __m512i fine = pairs64(p->fine + 2 * at);
    if (bits < 7) return _mm512_or_si512(_mm512_slli_epi16(u, 2), fine);
    const __m512i finest = pairs64(p->finest + 2 * at);
    return _mm512_or_si512(_mm512_slli_epi16(u, 4), _mm512_or_si512(_mm512_slli_epi16(fine, 2), finest));
}

static inline __attribute__((always_inline)) void numbers_to(const planes *p, int64_t row, int bits, int64_t g, uint8_t *to) {
    _mm512_storeu_si512(to, numbers(p, place(p, row, g), bits));
}

static inline __attribute__((always_inline)) void fetch(const planes *p, uint64_t at, int bits) {
    __builtin_prefetch(p->base + base_bits(bits) * at);
    if (bits >= 5) __builtin_prefetch(p->fine + 2 * at);
    if (bits >= 7) __builtin_prefetch(p->finest + 2 * at);
}

static inline __m512 halves(const uint16_t *s, int64_t n) {
    const __mmask16 own = n >= 16 ? 0xffff : (1u << n) - 1;
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(own, s));
}

/* The products of some rows with m vectors, of which each row is unpacked once; `next` are fetched meanwhile. How many rows
 * and vectors is known where this is compiled, so that the sums stay in registers. */
static inline __attribute__((always_inline)) void dots(const planes *p, const int64_t *row, const int64_t *next, int rows,
                                                       int bits, const rounded *x, int m, float out[AT_ONCE][MOST_VECTORS]) {
    const int64_t groups = p->d / 64;
    __m512 sum[AT_ONCE * MOST_VECTORS], offset[AT_ONCE * MOST_VECTORS]; /* of row r and vector t at r + t * rows */
    uint64_t at[AT_ONCE], then[AT_ONCE];
    for (int r = 0; r < rows; r++) at[r] = place(p, row[r], 0), then[r] = place(p, next[r], 0);
    for (int i = 0; i < rows * m; i++) sum[i] = offset[i] = _mm512_setzero_ps();
    for (int64_t g = 0; g < groups; g += 16) {
        const int64_t n = groups - g < 16 ? groups - g : 16;
        float scaled[AT_ONCE * MOST_VECTORS][16];
        for (int r = 0; r < rows; r++) {
            __builtin_prefetch(p->scale + next[r] * groups + g);
            const __m512 scale = halves(p->scale + row[r] * groups + g, n);
            for (int t = 0; t < m; t++) {
                const int i = r + t * rows;
                offset[i] = _mm512_fmadd_ps(scale, _mm512_loadu_ps(x[t].total + g), offset[i]);
                _mm512_storeu_ps(scaled[i], _mm512_mul_ps(scale, _mm512_loadu_ps(x[t].step + g)));
            }
        }
        for (int64_t i = 0; i < n; i++) {
            const __m512i first = _mm512_loadu_si512(x->code + (g + i) * 64); /* stays in a register for all rows */
            if (!(i & 1))
                for (int r = 0; r < rows; r++) fetch(p, then[r] + (g + i) * 8, bits);
            for (int r = 0; r < rows; r++) {
                const __m512i u = numbers(p, at[r] + (g + i) * 8, bits);
                for (int t = 0; t < m; t++) {
                    const __m512i codes = t ? _mm512_loadu_si512(x[t].code + (g + i) * 64) : first;
                    const __m512 whole = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(_mm512_setzero_si512(), u, codes));
                    sum[r + t * rows] = _mm512_fmadd_ps(_mm512_set1_ps(scaled[r + t * rows][i]), whole, sum[r + t * rows]);
                }
            }
        }
    }
    const __m512 middle = _mm512_set1_ps(middle_of(p, bits));
    for (int i = 0; i < rows * m; i++) sum[i] = _mm512_fnmadd_ps(middle, offset[i], sum[i]);
    for (int i = 0; i < rows * m; i += 4) {
        float found[4];
        const int more = i + 2 < rows * m ? 2 : 0; /* an odd pair is summed twice */
        _mm_storeu_ps(found, _mm_mul_ps(sums4(sum[i], sum[i + 1], sum[i + more], sum[i + more + 1]), _mm_set1_ps(1.0f / cells(bits))));
        for (int c = 0; c < 4 && i + c < rows * m; c++) out[(i + c) % rows][(i + c) / rows] = found[c];
    }
}

/* Factors of TILE rows for 16 groups in 8 bits: word[q][i] holds those of rows 4 q to 4 q + 3 for group i, step their unit;
 * what they leave over stays in f. */
static inline void round_factors(__m512 f[TILE], int32_t word[TILE / 4][16], float step[16]) {
    __m512 most = _mm512_setzero_ps();
    for (int r = 0; r < TILE; r++) most = _mm512_max_ps(most, _mm512_abs_ps(f[r]));
    const __m512 unit = _mm512_mul_ps(most, _mm512_set1_ps(1.0f / 127));
    const __mmask16 some = _mm512_cmp_ps_mask(most, _mm512_setzero_ps(), _CMP_GT_OQ);
    const __m512 inverse = _mm512_maskz_div_ps(some, _mm512_set1_ps(127), most);
    for (int q = 0; q < TILE / 4; q++) {
        __m512i packed = _mm512_setzero_si512();
        for (int r = 3; r >= 0; r--) {
            const __m512i code = _mm512_cvtps_epi32(_mm512_mul_ps(f[4 * q + r], inverse));
            f[4 * q + r] = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(code), unit, f[4 * q + r]);
            packed = _mm512_or_si512(_mm512_slli_epi32(packed, 8), _mm512_and_si512(code, _mm512_set1_epi32(255)));
        }
        _mm512_storeu_si512(word[q], packed);
    }
    _mm512_storeu_ps(step, unit);
}

static inline void add_to(float *y, __m512i sum, __m512 unit) {
    _mm512_storeu_ps(y, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), unit, _mm512_loadu_ps(y)));
}

/* Columns of a group as the unpacking below leaves them: of each quarter the first four, the second four, ... */
static inline void unshuffled(const float *y, float *to) {
    for (int i = 0; i < 4; i++)
        for (int lane = 0; lane < 4; lane++)
            for (int c = 0; c < 4; c++) to[lane * 16 + i * 4 + c] += y[i * 16 + lane * 4 + c];
}

/* y[t] += sum over rows of factor * number, total[t] += sum of the factors as they were rounded, of the groups g to g + n, for
 * m tokens, for which the rows are unpacked once; m is known where this is compiled. scale: of the rows; h[t][r]: what they
 * are multiplied with. Rows of more than their base's bits take factors in 15 bits. */
static inline __attribute__((always_inline)) void add_groups(const planes *p, const uint64_t *at, const uint64_t *next, int bits,
                                                             int64_t n, const __m512 scale[TILE],
                                                             float h[][TILE], int m, float y[][GROUPS * 64], __m512 *total) {
    int32_t word[SUMS][TILE / 4][16], finer[SUMS][TILE / 4][16];
    float step[SUMS][16], small[SUMS][16];
    for (int t = 0; t < m; t++) {
        __m512 f[TILE];
        for (int r = 0; r < TILE; r++) f[r] = _mm512_mul_ps(scale[r], _mm512_set1_ps(h[t][r]));
        for (int r = 0; r < TILE; r++) total[t] = _mm512_add_ps(total[t], f[r]);
        round_factors(f, word[t], step[t]);
        if (bits > 4) round_factors(f, finer[t], small[t]);
        for (int r = 0; r < TILE; r++) total[t] = _mm512_sub_ps(total[t], f[r]);
    }
    for (int64_t i = 0; i < n; i++) {
        __m512i sum[SUMS][4], rest[SUMS][4];
        for (int t = 0; t < m; t++)
            for (int c = 0; c < 4; c++) sum[t][c] = rest[t][c] = _mm512_setzero_si512();
        for (int q = 0; q < TILE / 4; q++) {
            __m512i u[4];
            for (int r = 0; r < 4; r++) {
                if (!(i & 1)) fetch(p, next[4 * q + r] + i * 8, bits);
                u[r] = numbers(p, at[4 * q + r] + i * 8, bits);
            }
            const __m512i a = _mm512_unpacklo_epi8(u[0], u[1]), b = _mm512_unpackhi_epi8(u[0], u[1]);
            const __m512i c = _mm512_unpacklo_epi8(u[2], u[3]), e = _mm512_unpackhi_epi8(u[2], u[3]);
            const __m512i own[4] = {_mm512_unpacklo_epi16(a, c), _mm512_unpackhi_epi16(a, c), _mm512_unpacklo_epi16(b, e),
                                    _mm512_unpackhi_epi16(b, e)};
            for (int t = 0; t < m; t++)
                for (int part = 0; part < 4; part++) {
                    sum[t][part] = _mm512_dpbusd_epi32(sum[t][part], own[part], _mm512_set1_epi32(word[t][q][i]));
                    if (bits > 4)
                        rest[t][part] = _mm512_dpbusd_epi32(rest[t][part], own[part], _mm512_set1_epi32(finer[t][q][i]));
                }
        }
        for (int t = 0; t < m; t++)
            for (int part = 0; part < 4; part++) {
                add_to(y[t] + i * 64 + part * 16, sum[t][part], _mm512_set1_ps(step[t][i]));
                if (bits > 4) add_to(y[t] + i * 64 + part * 16, rest[t][part], _mm512_set1_ps(small[t][i]));
            }
    }
}

/* y[t, groups from to to] += sum of rows, for m tokens, at most MOST_VECTORS; h[t, k] and y[t, d] */
static inline __attribute__((always_inline)) void add_tiles(const planes *p, int bits, int64_t first, const int64_t *index,
                                                            const float *h, int64_t h_stride, int64_t k, int64_t m, int64_t from,
                                                            int64_t to, float *y) {
    const int64_t groups = p->d / 64;
    for (int64_t g = from; g < to; g += GROUPS) { /* sums of so many columns stay in the cache */
        const int64_t n = to - g < GROUPS ? to - g : GROUPS;
        float own[MOST_VECTORS][GROUPS * 64];
        __m512 total[MOST_VECTORS];
        memset(own, 0, m * sizeof(own[0]));
        for (int64_t t = 0; t < m; t++) total[t] = _mm512_setzero_ps();
        for (int64_t j = 0; j < k; j += TILE) {
            uint64_t at[TILE], then[TILE]; /* the rows' places, and those of the rows fetched meanwhile */
            __m512 scale[TILE];
            float factor[MOST_VECTORS][TILE];
            for (int r = 0; r < TILE; r++) {
                const int64_t row = first + index[j + r < k ? j + r : k - 1];
                const int64_t next = first + index[j + TILE + r < k ? j + TILE + r : k - 1];
                at[r] = place(p, row, g), then[r] = place(p, next, g);
                __builtin_prefetch(p->scale + next * groups + g);
                scale[r] = halves(p->scale + row * groups + g, n);
                for (int64_t t = 0; t < m; t++) factor[t][r] = j + r < k ? h[t * h_stride + j + r] / cells(bits) : 0;
            }
            int64_t t = 0;
            if (bits <= 4)
                for (; t + 4 <= m; t += 4) add_groups(p, at, then, bits, n, scale, factor + t, 4, own + t, total + t);
            for (; t + 2 <= m; t += 2) add_groups(p, at, then, bits, n, scale, factor + t, 2, own + t, total + t);
            if (t < m) add_groups(p, at, then, bits, n, scale, factor + t, 1, own + t, total + t);
        }
        for (int64_t t = 0; t < m; t++) {
            float middle[16];
            _mm512_storeu_ps(middle, _mm512_mul_ps(total[t], _mm512_set1_ps(-middle_of(p, bits))));
            for (int64_t i = 0; i < n; i++) {
                for (int c = 0; c < 64; c++) own[t][i * 64 + c] += middle[i];
                unshuffled(own[t] + i * 64, y + t * p->d + (g + i) * 64);
            }
        }
    }
}
