/* Products with chosen rows in nested planes (planes.py says how they are coded), and a whole FFN of them.
 *
 * Row r of d weights: `base` d / 2 bytes, `fine` and `finest` d / 4 each, `scale` d / group float16. Vectors that rows
 * are multiplied with are rounded to 8 bits, one scale per group, so that integers are multiplied; sums of rows take their
 * factors in 8 bits per group and TILE rows, twice over (15 bits) for rows of more than 4 bits. Integers are added
 * exactly, floats in an order that does not depend on the number of threads.
 */
#include "common.h"

#include <math.h>
#include <stdlib.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

typedef struct {
    const uint8_t *base, *fine, *finest;
    const uint16_t *scale;
    int64_t n_rows, d, group;
} planes;

typedef float wide __attribute__((vector_size(32), aligned(4)));

static const float MIDDLE[9] = {[4] = 8.0f, [6] = 33.5f, [8] = 135.5f};

/* the value of weight i of a row as its number in so many bits */
static inline int number(const planes *p, int64_t row, int bits, int64_t g, int64_t i) {
    const int64_t half_group = p->group / 2, quarter = p->group / 4, at = g * p->group;
    const uint8_t byte = p->base[row * (p->d / 2) + at / 2 + i % half_group];
    int u = i < half_group ? byte & 15 : byte >> 4;
    const int64_t pair = row * (p->d / 4) + at / 4 + i % quarter;
    const int shift = 2 * (int)(i / quarter);
    if (bits >= 6) u = u << 2 | (p->fine[pair] >> shift & 3);
    if (bits >= 8) u = u << 2 | (p->finest[pair] >> shift & 3);
    return u;
}

/* ---- a vector in 8 bits per group ---- */

typedef struct {
    int8_t *code;  /* [d] */
    float *step;   /* [groups], padded to a multiple of 8 */
    float *total;  /* [groups]: the sum of a group's rounded values */
} rounded;

static void round_vector(const float *x, int64_t d, int64_t group, rounded *to) {
    for (int64_t g = 0; g < d / group; g++) {
        const float *own = x + g * group;
        float most = 0;
        for (int64_t i = 0; i < group; i++) most = fabsf(own[i]) > most ? fabsf(own[i]) : most;
        const float step = most / 127, inverse = most > 0 ? 127 / most : 0;
        int32_t sum = 0;
        for (int64_t i = 0; i < group; i++) {
            const int32_t code = (int32_t)nearbyintf(own[i] * inverse);
            to->code[g * group + i] = (int8_t)code;
            sum += code;
        }
        to->step[g] = step;
        to->total[g] = step * sum;
    }
}

/* ---- row . vector ---- */

static float dot_plain(const planes *p, int64_t row, int bits, const rounded *x) {
    float sum = 0;
    for (int64_t g = 0; g < p->d / p->group; g++) {
        int32_t part = 0;
        for (int64_t i = 0; i < p->group; i++) part += number(p, row, bits, g, i) * x->code[g * p->group + i];
        sum += from_half(p->scale[row * (p->d / p->group) + g]) * (x->step[g] * part - MIDDLE[bits] * x->total[g]);
    }
    return sum / (1 << (bits - 4));
}

#if defined(__AVX2__) && defined(__F16C__) && defined(__FMA__)
#define VECTORS 1
#define AT_ONCE 4

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

static inline __m256i times4(__m256i small) { return _mm256_slli_epi16(small, 2); } /* bytes below 64 */

/* sums of neighbours of (numbers of a group of 64) * (codes of x), eight int32 */
static inline __m256i group_dot(const planes *p, int64_t row, int bits, int64_t g, __m256i x0, __m256i x1) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i low, high, a, b;
    nibbles(p->base + row * (p->d / 2) + g * 32, &low, &high);
    if (bits == 4)
        return _mm256_madd_epi16(_mm256_add_epi16(_mm256_maddubs_epi16(low, x0), _mm256_maddubs_epi16(high, x1)), ones);
    pairs(p->fine + row * (p->d / 4) + g * 16, &a, &b);
    if (bits == 6) {
        low = _mm256_or_si256(times4(low), a), high = _mm256_or_si256(times4(high), b);
        return _mm256_madd_epi16(_mm256_add_epi16(_mm256_maddubs_epi16(low, x0), _mm256_maddubs_epi16(high, x1)), ones);
    }
    __m256i c, e;
    pairs(p->finest + row * (p->d / 4) + g * 16, &c, &e);
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
    __builtin_prefetch(p->base + row * (p->d / 2) + g * 32);
    if (bits >= 6) __builtin_prefetch(p->fine + row * (p->d / 4) + g * 16);
    if (bits >= 8) __builtin_prefetch(p->finest + row * (p->d / 4) + g * 16);
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
    for (int r = 0; r < AT_ONCE; r++) out[r] = (across(sum[r]) - MIDDLE[bits] * across(offset[r])) / (1 << (bits - 4));
}
#endif

/* out[j] = row[index[j]] . x, index NULL: rows first, first + 1, ... */
static void rows_dot(const planes *p, int bits, int64_t first, const int64_t *index, int64_t k, const rounded *x, float *out,
                     int threads) {
#ifdef VECTORS
    if (p->group == 64) {
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int64_t j = 0; j < k; j += AT_ONCE) {
            int64_t now[AT_ONCE], next[AT_ONCE];
            for (int r = 0; r < AT_ONCE; r++) {
                const int64_t a = j + r < k ? j + r : k - 1, b = j + AT_ONCE + r < k ? j + AT_ONCE + r : k - 1;
                now[r] = first + (index ? index[a] : a), next[r] = first + (index ? index[b] : b);
            }
            float found[AT_ONCE];
            if (bits == 4) dots(p, now, next, 4, x, found);
            else if (bits == 6) dots(p, now, next, 6, x, found);
            else dots(p, now, next, 8, x, found);
            for (int r = 0; r < AT_ONCE && j + r < k; r++) out[j + r] = found[r];
        }
        return;
    }
#endif
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t j = 0; j < k; j++) out[j] = dot_plain(p, first + (index ? index[j] : j), bits, x);
}

/* ---- sums of rows ---- */

#define TILE 16 /* rows whose factors share a scale per group: as many as 16-bit sums of nibbles hold */

static void add_plain(const planes *p, int bits, int64_t first, const int64_t *index, const float *h, int64_t k, int64_t from,
                      int64_t to, float *y) {
    for (int64_t j = 0; j < k; j++) {
        const int64_t row = first + index[j];
        for (int64_t g = from; g < to; g++) {
            const float f = h[j] * from_half(p->scale[row * (p->d / p->group) + g]) / (1 << (bits - 4));
            for (int64_t i = 0; i < p->group; i++) y[g * p->group + i] += f * (number(p, row, bits, g, i) - MIDDLE[bits]);
        }
    }
}

#ifdef VECTORS
/* which small numbers of a row: its nibbles, the pairs of `fine`, those of `fine` and `finest` as one nibble */
enum { NIBBLES, QUARTERS, SIXTEENTHS };
static const float CENTRE[] = {8.0f, 1.5f, 7.5f};

static inline void small_numbers(const planes *p, int64_t row, int kind, int64_t g, __m256i *low, __m256i *high) {
    if (kind == NIBBLES) return nibbles(p->base + row * (p->d / 2) + g * 32, low, high);
    pairs(p->fine + row * (p->d / 4) + g * 16, low, high);
    if (kind == QUARTERS) return;
    __m256i a, b;
    pairs(p->finest + row * (p->d / 4) + g * 16, &a, &b);
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
            for (int r = 0; r < TILE; r++) __builtin_prefetch(p->base + next[r] * (p->d / 2) + (g + i) * 32);
        add_group(p, row, kind, g + i, own, steps[i], totals[i], y + (g + i) * 64);
    }
}

static void add_tiles(const planes *p, int bits, int64_t first, const int64_t *index, const float *h, int64_t k, int64_t from,
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
                if (n < 8) memcpy(part, s, n * 2);
                const __m128i eight = _mm_loadu_si128((const __m128i *)(n < 8 ? part : s));
                whole[r] = f[r] = _mm256_mul_ps(_mm256_cvtph_ps(eight), _mm256_set1_ps(own[r]));
            }
            add_pass(p, row, next, NIBBLES, g, n, f, y);
            if (bits == 4) continue;
            add_pass(p, row, 0, NIBBLES, g, n, f, y); /* what 8 bits of the factors left over */
            for (int r = 0; r < TILE; r++) f[r] = _mm256_mul_ps(whole[r], _mm256_set1_ps(bits == 6 ? 0.25f : 0.0625f));
            if (bits == 6) add_pass(p, row, 0, QUARTERS, g, n, f, y);
            else add_pass(p, row, 0, SIXTEENTHS, g, n, f, y);
        }
    }
}
#endif

/* y[d] += sum over j of h[j] * row[index[j]] */
static void rows_add(const planes *p, int bits, int64_t first, const int64_t *index, const float *h, int64_t k, float *y,
                     int threads) {
    const int64_t groups = p->d / p->group, chunk = (groups + threads - 1) / threads; /* each thread has its columns */
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t c = 0; c < threads; c++) {
        const int64_t from = c * chunk, to = from + chunk < groups ? from + chunk : groups;
#ifdef VECTORS
        if (p->group == 64) {
            add_tiles(p, bits, first, index, h, k, from, to, y);
            continue;
        }
#endif
        add_plain(p, bits, first, index, h, k, from, to, y);
    }
}

/* ---- what Python calls ---- */

static int new_rounded(int64_t d, int64_t group, rounded *x) {
    const int64_t groups = (d / group + 7) / 8 * 8;
    x->code = malloc(d + 2 * groups * sizeof(float) + 64);
    if (!x->code) return 0;
    x->step = (float *)(((uintptr_t)x->code + d + 63) / 64 * 64);
    x->total = x->step + groups;
    memset(x->step, 0, 2 * groups * sizeof(float));
    return 1;
}

#define OUT_OF_MEMORY INT64_MAX

/* out[n, k] = rows[index[n, k]] . x[n]; index NULL: the first k rows */
int64_t planes_dot(const uint8_t *base, const uint8_t *fine, const uint8_t *finest, const uint16_t *scale, int64_t n_rows,
                   int64_t d, int64_t group, int bits, const int64_t *index, int64_t n, int64_t k, const float *x, float *out,
                   int threads) {
    const planes p = {base, fine, finest, scale, n_rows, d, group};
    const int64_t outside = index ? first_outside(index, n * k, n_rows) : -1;
    if (outside >= 0) return outside;
    rounded own;
    if (!new_rounded(d, group, &own)) return OUT_OF_MEMORY;
    for (int64_t t = 0; t < n; t++) {
        round_vector(x + t * d, d, group, &own);
        rows_dot(&p, bits, 0, index ? index + t * k : NULL, k, &own, out + t * k, threads);
    }
    free(own.code);
    return -1;
}

/* out[n, d] = sum over k of h[n, k] * rows[index[n, k]] */
int64_t planes_add(const uint8_t *base, const uint8_t *fine, const uint8_t *finest, const uint16_t *scale, int64_t n_rows,
                   int64_t d, int64_t group, int bits, const int64_t *index, int64_t n, int64_t k, const float *h, float *out,
                   int threads) {
    const planes p = {base, fine, finest, scale, n_rows, d, group};
    const int64_t outside = first_outside(index, n * k, n_rows);
    if (outside >= 0) return outside;
    memset(out, 0, n * d * sizeof(float));
    for (int64_t t = 0; t < n && k; t++) rows_add(&p, bits, 0, index + t * k, h + t * k, k, out + t * d, threads);
    return -1;
}

/* ---- a whole FFN in tiers ---- */

void choose(const float *score, int64_t n, int64_t u, int64_t k, uint32_t *work, int64_t *index); /* rows.c */

enum { SILU, GELU_TANH, GELU, RELU };

static inline float activated(float g, int activation) {
    switch (activation) {
    case SILU: return g / (1 + expf(-g));
    case GELU_TANH: return g / (1 + expf(-1.5957691216f * (g + 0.044715f * g * g * g)));
    case GELU: return 0.5f * g * (1 + erff(g * 0.70710678f));
    default: return g > 0 ? g : 0;
    }
}

/* y[n, d] of x[n, d]; index[n, K]: the channels read, the best tier first, rising within each.
 *
 * Rows of token t begin at first[t]; rms, norm and biases (or NULL) are of all rows. Tier i reads count[i] channels in
 * bits[i] bits. Returns -1, or OUT_OF_MEMORY.
 */
int64_t tiers_ffn(const void *const *gate, const void *const *up, const void *const *down, int64_t n_rows, int64_t d,
                  int64_t group, int64_t d_ff, const float *rms, const float *norm, const float *gate_bias,
                  const float *up_bias, int activation, int64_t n_tiers, const int64_t *bits, const int64_t *count,
                  const int64_t *first, int64_t n, const float *x, float *y, int64_t *index, int threads) {
    const planes g = {gate[0], gate[1], gate[2], gate[3], n_rows, d, group};
    const planes u = {up[0], up[1], up[2], up[3], n_rows, d, group};
    const planes w = {down[0], down[1], down[2], down[3], n_rows, d, group};
    const int64_t outside = first_outside(first, n, n_rows - d_ff + 1);
    if (outside >= 0) return outside;
    int64_t all = 0;
    for (int64_t i = 0; i < n_tiers; i++) all += count[i];
    rounded own;
    float *const values = malloc((4 * d_ff) * sizeof(float)), *const score = values + d_ff, *const h = values + 2 * d_ff;
    float *const gates = values + 3 * d_ff;
    int64_t *const place = malloc(2 * d_ff * sizeof(int64_t)), *const left = place + d_ff;
    uint32_t *const work = malloc(d_ff * sizeof(uint32_t));
    if (!values || !place || !work || !new_rounded(d, group, &own)) {
        free(values), free(place), free(work);
        return OUT_OF_MEMORY;
    }
    memset(y, 0, n * d * sizeof(float));
    for (int64_t t = 0; t < n; t++, index += all) {
        const int64_t from = first[t];
        round_vector(x + t * d, d, group, &own);
        rows_dot(&g, 4, from, NULL, d_ff, &own, values, threads);
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int64_t i = 0; i < d_ff; i++) {
            if (gate_bias) values[i] += gate_bias[from + i];
            score[i] = fabsf(activated(values[i], activation) * rms[from + i]) * norm[from + i];
        }
        /* from the last tier to the first: the best of what is left belong to those before it */
        choose(score, 1, d_ff, all, work, left);
        int64_t kept = all;
        for (int64_t i = n_tiers - 1; i >= 0; i--) {
            const int64_t better = kept - count[i];
            int64_t *tier = index + better, filled = 0, next = 0;
            for (int64_t j = 0; j < kept; j++) h[j] = score[left[j]];
            if (better) choose(h, 1, kept, better, work, place);
            for (int64_t j = 0, m = 0; j < kept; j++) {
                if (m < better && place[m] == j) left[next++] = left[j], m++;
                else tier[filled++] = left[j];
            }
            kept = better;
        }
        const int64_t *tier = index;
        for (int64_t i = 0; i < n_tiers; tier += count[i++]) {
            if (!count[i]) continue;
            rows_dot(&u, bits[i], from, tier, count[i], &own, h, threads);
            if (bits[i] > 4) rows_dot(&g, bits[i], from, tier, count[i], &own, gates, threads);
#pragma omp parallel for schedule(static) num_threads(threads)
            for (int64_t j = 0; j < count[i]; j++) {
                const int64_t row = from + tier[j];
                const float value = bits[i] == 4 ? values[tier[j]] : gates[j] + (gate_bias ? gate_bias[row] : 0);
                h[j] = activated(value, activation) * (h[j] + (up_bias ? up_bias[row] : 0));
            }
            rows_add(&w, bits[i], from, tier, h, count[i], y + t * d, threads);
        }
    }
    free(own.code), free(values), free(place), free(work);
    return -1;
}
