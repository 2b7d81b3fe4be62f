/* A matrix of bfloat16, or a slice of its columns, by a few vectors: each weight is read once for all of them. */
#include "common.h"
#include "operators.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#define ROWS 4 /* that go together, so that a vector is loaded once for all of them */
#define MOST 8 /* vectors, whose sums stay in registers with those rows' */
#define STEP 32
#define STRIP 2048 /* columns, of which MOST vectors stay in the first-level cache; always so many, so that the order of a sum
                      does not depend on the number of vectors */
#define BAND 32    /* rows that are gone through together, a strip of their columns at a time */
#define FAR 4096   /* numbers: weights are fetched at least so far ahead, by whole tiles of rows */

#ifdef __AVX512BF16__
typedef __m512 lanes;
#define SUM(acc, w, x) _mm512_dpbf16_ps(acc, (__m512bh)(w), (__m512bh)(x))
typedef __m512i piece;
static inline piece piece_at(const uint16_t *from) { return _mm512_loadu_si512(from); }
static inline piece end_at(const uint16_t *from, int64_t n) { return _mm512_maskz_loadu_epi16((1u << n) - 1, from); }
static inline lanes nothing(void) { return _mm512_setzero_ps(); }
/* the sums of four at once */
static inline void across(const lanes *a, int64_t step, float *out) {
    __m256 half[ROWS];
    for (int i = 0; i < ROWS; i++)
        half[i] = _mm256_add_ps(_mm512_castps512_ps256(a[i * step]), _mm512_extractf32x8_ps(a[i * step], 1));
    const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}
#else
typedef float half_lanes __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32), aligned(2)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef half_lanes lanes;
typedef struct {
    half_lanes low, high;
} piece;
static inline half_lanes wide(const uint16_t *from) {
    const words bits = __builtin_convertvector(*(const halves *)from, words) << 16;
    half_lanes f;
    memcpy(&f, &bits, sizeof f);
    return f;
}
static inline piece piece_at(const uint16_t *from) { return (piece){wide(from), wide(from + STEP / 2)}; }
static inline piece end_at(const uint16_t *from, int64_t n) {
    uint16_t all[STEP] = {0};
    memcpy(all, from, n * sizeof *from);
    return piece_at(all);
}
static inline lanes nothing(void) { return (lanes){0}; }
static inline lanes SUM(lanes acc, piece w, piece x) { return acc + w.low * x.low + w.high * x.high; }
static inline void across(const lanes *a, int64_t step, float *out) {
    for (int i = 0; i < ROWS; i++) {
        out[i] = 0;
        for (int lane = 0; lane < STEP / 2; lane++) out[i] += a[i * step][lane];
    }
}
#endif

/* the sums of rows and n vectors, and of the columns from j on, all STEP or the first `some` of them */
static inline __attribute__((always_inline)) void add(lanes sum[ROWS][MOST], const uint16_t *const *row, int64_t j, int64_t some,
                                                      int64_t ahead, const uint16_t *x, const int n) {
    piece own[ROWS];
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; i++) {
        own[i] = some < STEP ? end_at(row[i] + j, some) : piece_at(row[i] + j);
        __builtin_prefetch(row[i] + j + ahead);
    }
#pragma GCC unroll 8
    for (int t = 0; t < n; t++) {
        const piece v = piece_at(x + n * j + STEP * t);
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; i++) sum[i][t] = SUM(sum[i][t], own[i], v);
    }
}

typedef struct {
    const uint16_t *w;
    int64_t n_rows, stride; /* in numbers, from one row to the next */
    int64_t ahead;          /* in numbers, from what is read to what is fetched meanwhile */
    const float *bias;
} matrix;

/* out[t, r] of rows r, r + 1, ... and n vectors, of the columns from `from` on; rows beyond the last are the last one again.
 * x: the vectors' numbers of these columns side by side, STEP of each */
static inline __attribute__((always_inline)) void block(const matrix *all, int64_t r, int64_t from, int64_t to, const uint16_t *x,
                                                        const int n, float *out) {
    lanes sum[ROWS][MOST];
    const uint16_t *row[ROWS];
    for (int i = 0; i < ROWS; i++) row[i] = all->w + (r + i < all->n_rows ? r + i : all->n_rows - 1) * all->stride;
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 8
        for (int t = 0; t < n; t++) sum[i][t] = nothing();
    int64_t j = from;
    for (; j + STEP <= to; j += STEP) add(sum, row, j, STEP, all->ahead, x, n);
    if (j < to) add(sum, row, j, to - j, all->ahead, x, n);
    for (int t = 0; t < n; t++) {
        float found[ROWS], *y = out + t * all->n_rows + r;
        across(&sum[0][t], MOST, found);
        for (int i = 0; i < ROWS && r + i < all->n_rows; i++) y[i] = found[i] + (from ? y[i] : all->bias ? all->bias[r + i] : 0);
    }
}

#define OF(N)                                                          \
    case N:                                                            \
        block(&all, r, from, to, work + t * padded, N, out + t * n_rows); \
        break;

/* out[n, n_rows] = x[n, d] by each row, and the bias; x in bfloat16 too, the sums in float32. stride: from row to row, in
 * numbers; work: as large as x, in rows of a multiple of 32 */
void few_linear(const uint16_t *w, int64_t n_rows, int64_t stride, int64_t d, const uint16_t *x, int64_t n, const float *bias,
                uint16_t *work, float *out, int threads) {
    const int64_t padded = (d + STEP - 1) / STEP * STEP;
    for (int64_t t = 0; t < n; t++) { /* to those that are taken together */
        const int64_t first = t / MOST * MOST, m = n - first < MOST ? n - first : MOST;
        uint16_t *const own = work + first * padded + (t - first) * STEP;
        for (int64_t j = 0; j < d; j += STEP) {
            const int64_t some = d - j < STEP ? d - j : STEP;
            memcpy(own + m * j, x + t * d + j, some * sizeof *x);
            memset(own + m * j + some, 0, (STEP - some) * sizeof *x);
        }
    }
    const int64_t tile = ROWS * stride;
    const int64_t rows = d > STRIP ? BAND : ROWS; /* fewer share better among threads */
    const matrix all = {w, n_rows, stride, tile * ((FAR + tile - 1) / tile), bias};
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t band = 0; band < n_rows; band += rows)
        for (int64_t from = 0; from < d; from += STRIP)
            for (int64_t r = band; r < band + rows && r < n_rows; r += ROWS)
                for (int64_t t = 0; t < n; t += MOST) {
                    const int64_t to = from + STRIP < d ? from + STRIP : d;
                    switch (n - t < MOST ? n - t : MOST) {
                        OF(1) OF(2) OF(3) OF(4) OF(5) OF(6) OF(7) OF(8)
                    }
                }
}
