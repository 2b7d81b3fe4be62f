/* Products with chosen rows of a matrix, read where they lie.
 *
 * Rows are float32 or bfloat16 (kind 0 or 1), `d` contiguous elements each, `stride` elements apart. Indexes
 * are int64. Accumulation is float32. Outputs are written whole, in an order that does not depend on
 * the number of threads, which is the caller's: torch may bring another OpenMP than this one.
 *
 * Whoever takes an index returns -1, or the place of the first one that names no row; then nothing is written.
 */
#include "common.h"
#ifdef __AVX512F__
#include <immintrin.h>
#endif

typedef float lanes __attribute__((vector_size(64), aligned(4)));
typedef uint16_t halves __attribute__((vector_size(32), aligned(2)));
typedef uint32_t words __attribute__((vector_size(64)));
#define LANES 16
#define LINE 64

static inline lanes load(const void *row, int kind, int64_t i) {
    if (!kind) return *(const lanes *)((const float *)row + i);
    const words wide = __builtin_convertvector(*(const halves *)((const uint16_t *)row + i), words) << 16;
    lanes f;
    memcpy(&f, &wide, sizeof f);
    return f;
}

static inline float single(const void *row, int kind, int64_t i) {
    if (!kind) return ((const float *)row)[i];
    const uint32_t bits = (uint32_t)((const uint16_t *)row)[i] << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static inline float across(lanes a) {
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += a[lane];
    return sum;
}

/* Rows are read AT_ONCE together, so that x (or y) is loaded once for all of them, while the lines of the rows
 * that follow are fetched: chosen rows form no pattern that the processor would foresee. */
#define AT_ONCE 4

typedef struct {
    const char *now[AT_ONCE], *next[AT_ONCE];
} together;

#define FETCH(next, kind, i)                                  \
    do {                                                      \
        __builtin_prefetch((next) + (i) * ((kind) ? 2 : 4));  \
        if (!(kind)) __builtin_prefetch((next) + (i) * 4 + LINE); \
    } while (0)

static inline void dots(const together *rows, int kind, const float *x, int64_t d, float *out) {
    lanes a[AT_ONCE] = {{0}}, b[AT_ONCE] = {{0}};
    int64_t i = 0;
    for (; i + 2 * LANES <= d; i += 2 * LANES) {
        const lanes first = *(const lanes *)(x + i), second = *(const lanes *)(x + i + LANES);
#pragma GCC unroll 4
        for (int r = 0; r < AT_ONCE; r++) {
            FETCH(rows->next[r], kind, i);
            a[r] += load(rows->now[r], kind, i) * first;
            b[r] += load(rows->now[r], kind, i + LANES) * second;
        }
    }
    for (int r = 0; r < AT_ONCE; r++) {
        out[r] = across(a[r] + b[r]);
        for (int64_t j = i; j < d; j++) out[r] += single(rows->now[r], kind, j) * x[j];
    }
}

static inline void add(float *y, const together *rows, int kind, const float *h, int64_t d) {
    int64_t i = 0;
    for (; i + 2 * LANES <= d; i += 2 * LANES) {
        lanes a = *(lanes *)(y + i), b = *(lanes *)(y + i + LANES);
#pragma GCC unroll 4
        for (int r = 0; r < AT_ONCE; r++) {
            FETCH(rows->next[r], kind, i);
            a += h[r] * load(rows->now[r], kind, i);
            b += h[r] * load(rows->now[r], kind, i + LANES);
        }
        *(lanes *)(y + i) = a;
        *(lanes *)(y + i + LANES) = b;
    }
    for (; i < d; i++)
        for (int r = 0; r < AT_ONCE; r++) y[i] += h[r] * single(rows->now[r], kind, i);
}

/* the chosen rows from place j on, and those after them; the last one stands in for what is missing */
static inline together chosen(const char *base, int64_t step, const int64_t *index, int64_t j, int64_t end) {
    together rows;
    for (int r = 0; r < AT_ONCE; r++) {
        rows.now[r] = base + index[j + r < end ? j + r : end - 1] * step;
        rows.next[r] = base + index[j + AT_ONCE + r < end ? j + AT_ONCE + r : end - 1] * step;
    }
    return rows;
}

/* out[n, k] = rows[index[n, k]] . x[n] */
int64_t gather_dot(const void *rows, int kind, int64_t n_rows, int64_t stride, int64_t d, const int64_t *index,
                   int64_t n, int64_t k, const float *x, float *out, int threads) {
    const int64_t step = stride * (kind ? 2 : 4), outside = first_outside(index, n * k, n_rows);
    if (outside >= 0) return outside;
#pragma omp parallel for schedule(static) collapse(2) num_threads(threads)
    for (int64_t t = 0; t < n; t++) {
        for (int64_t j = 0; j < k; j += AT_ONCE) {
            const together four = chosen(rows, step, index + t * k, j, k);
            float found[AT_ONCE];
            if (kind) dots(&four, 1, x + t * d, d, found);
            else dots(&four, 0, x + t * d, d, found);
            for (int r = 0; r < AT_ONCE && j + r < k; r++) out[t * k + j + r] = found[r];
        }
    }
    return -1;
}

/* parts[p, n, d] = sum over the p-th share of k of h[n, k] * rows[index[n, k]] */
int64_t gather_sum(const void *rows, int kind, int64_t n_rows, int64_t stride, int64_t d, const int64_t *index,
                   int64_t n, int64_t k, const float *h, int64_t n_parts, float *parts, int threads) {
    const int64_t step = stride * (kind ? 2 : 4), outside = first_outside(index, n * k, n_rows);
    if (outside >= 0) return outside;
#pragma omp parallel for schedule(static) collapse(2) num_threads(threads)
    for (int64_t p = 0; p < n_parts; p++) {
        for (int64_t t = 0; t < n; t++) {
            float *y = parts + (p * n + t) * d;
            const int64_t end = (p + 1) * k / n_parts;
            memset(y, 0, d * sizeof(float));
            for (int64_t j = p * k / n_parts; j < end; j += AT_ONCE) {
                const together four = chosen(rows, step, index + t * k, j, end);
                float own[AT_ONCE];
                for (int r = 0; r < AT_ONCE; r++) own[r] = j + r < end ? h[t * k + j + r] : 0;
                if (kind) add(y, &four, 1, own, d);
                else add(y, &four, 0, own, d);
            }
        }
    }
    return -1;
}

/* out[n, r] = matrices[block[n], r] . x[n]; matrices `apart` elements apart */
int64_t block_dot(const void *matrices, int kind, int64_t n_matrices, int64_t apart, int64_t stride, int64_t n_rows,
                  int64_t d, const int64_t *block, int64_t n, const float *x, float *out, int threads) {
    const int64_t size = kind ? 2 : 4, step = stride * size, outside = first_outside(block, n, n_matrices);
    if (outside >= 0) return outside;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t j = 0; j < n_rows; j += AT_ONCE) {
        for (int64_t t = 0; t < n; t++) { /* innermost: tokens of one matrix find its rows in the cache */
            const char *base = (const char *)matrices + block[t] * apart * size;
            together four;
            for (int r = 0; r < AT_ONCE; r++) {
                const int64_t now = j + r < n_rows ? j + r : n_rows - 1;
                four.now[r] = base + now * step;
                four.next[r] = base + (now + AT_ONCE < n_rows ? now + AT_ONCE : n_rows - 1) * step;
            }
            float found[AT_ONCE];
            if (kind) dots(&four, 1, x + t * d, d, found);
            else dots(&four, 0, x + t * d, d, found);
            for (int r = 0; r < AT_ONCE && j + r < n_rows; r++) out[t * n_rows + j + r] = found[r];
        }
    }
    return -1;
}

typedef uint8_t bytes16 __attribute__((vector_size(16), aligned(1)));
typedef int32_t ints __attribute__((vector_size(64)));

/* sixteen codes of 8 bits, signed */
static inline lanes signed_bytes(bytes16 c) {
    /* by way of unsigned ones: GCC takes sixteen steps to widen signed bytes */
    return __builtin_convertvector(__builtin_convertvector(c ^ 128, ints) - 128, lanes);
}

/* sixteen codes of 4 bits in the low nibbles of c, 8 more than their values; what is above the nibbles is ignored */
static inline lanes nibbles(ints c) {
#ifdef __AVX512F__
    const lanes values = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
    return (lanes)_mm512_permutexvar_ps((__m512i)c, (__m512)values);
#else
    return __builtin_convertvector((c & 15) - 8, lanes);
#endif
}

static inline ints widened(const uint8_t *c) {
#ifdef __AVX512F__
    return (ints)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)c));
#else
    return __builtin_convertvector(*(const bytes16 *)c, ints);
#endif
}

/* codes of AT_ONCE rows, `bytes` apart, times x; groups of a multiple of 32 */
static inline void quantised_dots(const uint8_t *c, int64_t bytes, const uint16_t *scale, int bits, const float *x,
                                  int64_t groups, int64_t group, float *out) {
    lanes total[AT_ONCE] = {{0}};
    for (int64_t g = 0; g < groups; g++) {
        lanes part[AT_ONCE] = {{0}};
        const float *own = x + g * group;
        const uint8_t *codes = c + g * group * bits / 8;
        if (bits == 8) {
            for (int64_t i = 0; i < group; i += LANES) {
                const lanes v = *(const lanes *)(own + i);
#pragma GCC unroll 4
                for (int r = 0; r < AT_ONCE; r++) part[r] += signed_bytes(*(const bytes16 *)(codes + r * bytes + i)) * v;
            }
        } else { /* the first half of a group in the low nibbles, the second in the high ones */
            for (int64_t i = 0; i < group / 2; i += LANES) {
                const lanes low = *(const lanes *)(own + i), high = *(const lanes *)(own + group / 2 + i);
#pragma GCC unroll 4
                for (int r = 0; r < AT_ONCE; r++) {
                    const ints both = widened(codes + r * bytes + i);
                    part[r] += nibbles(both) * low + nibbles(both >> 4) * high;
                }
            }
        }
        for (int r = 0; r < AT_ONCE; r++) {
            __builtin_prefetch(codes + (AT_ONCE + r) * bytes);
            total[r] += from_half(scale[r * groups + g]) * part[r];
        }
    }
    for (int r = 0; r < AT_ONCE; r++) out[r] = across(total[r]);
}

/* one row, groups of any even size */
static float quantised_row(const uint8_t *c, const uint16_t *scale, int bits, const float *x, int64_t groups,
                           int64_t group) {
    float sum = 0;
    for (int64_t g = 0; g < groups; g++, c += group * bits / 8, x += group) {
        float part = 0;
        for (int64_t i = 0; i < (bits == 8 ? group : group / 2); i++) {
            if (bits == 8) part += (float)(int8_t)c[i] * x[i];
            else part += (float)((c[i] & 15) - 8) * x[i] + (float)((c[i] >> 4) - 8) * x[group / 2 + i];
        }
        sum += from_half(scale[g]) * part;
    }
    return sum;
}

/* out[n, r] = sum over groups of scale[row, group] * (codes[row, group] . x[n, group]), row = block[n] * n_rows + r */
int64_t quantised_dot(const uint8_t *codes, const uint16_t *scale, int bits, int64_t n_blocks, int64_t n_rows,
                      int64_t d, int64_t group, const float *x, const int64_t *block, int64_t n, float *out,
                      int threads) {
    const int64_t groups = d / group, bytes = d * bits / 8, outside = first_outside(block, n, n_blocks);
    if (outside >= 0) return outside;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < n_rows; r += AT_ONCE) {
        for (int64_t t = 0; t < n; t++) {
            const int64_t row = block[t] * n_rows + r;
            const uint8_t *c = codes + row * bytes;
            const uint16_t *s = scale + row * groups;
            const float *own = x + t * d;
            float *to = out + t * n_rows + r;
            if (r + AT_ONCE > n_rows || group % 32) {
                for (int64_t i = 0; i < AT_ONCE && r + i < n_rows; i++)
                    to[i] = quantised_row(c + i * bytes, s + i * groups, bits, own, groups, group);
            } else if (group == 64) { /* the usual size as a constant, so that the loops unroll */
                if (bits == 4) quantised_dots(c, bytes, s, 4, own, groups, 64, to);
                else quantised_dots(c, bytes, s, 8, own, groups, 64, to);
            } else {
                quantised_dots(c, bytes, s, bits, own, groups, group, to);
            }
        }
    }
    return -1;
}

/* order-preserving: a lower float has a lower key */
static inline uint32_t key(float score) {
    uint32_t bits;
    if (score != score) return 0xffffffffu; /* no number: above all, as in torch */
    score += 0.0f;                          /* -0 is 0 */
    memcpy(&bits, &score, 4);
    return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

#define BUCKETS 4096 /* of the highest 12 bits of a key */

/* index[n, k]: places of the k highest of score[n, u], rising; ties go to the lower place. `work` holds u words; 1 <= k <= u. */
void choose(const float *score, int64_t n, int64_t u, int64_t k, uint32_t *work, int64_t *index) {
    for (int64_t t = 0; t < n; t++) {
        const float *own = score + t * u;
        int32_t count[BUCKETS] = {0};
        for (int64_t i = 0; i < u; i++) count[key(own[i]) >> 20]++;
        int64_t bucket = BUCKETS - 1, above = 0; /* the bucket of the k-th highest, and how many lie above it */
        while (above + count[bucket] < k) above += count[bucket--];
        int64_t inside = 0;
        for (int64_t i = 0; i < u; i++)
            if (key(own[i]) >> 20 == (uint64_t)bucket) work[inside++] = key(own[i]);
        const uint32_t least = kth_highest(work, inside, k - above - 1);
        int64_t ties = k, taken = 0, *out = index + t * k;
        for (int64_t i = 0; i < u; i++) ties -= key(own[i]) > least;
        for (int64_t i = 0; i < u && taken < k; i++) {
            const uint32_t own_key = key(own[i]);
            if (own_key > least || (own_key == least && ties-- > 0)) out[taken++] = i;
        }
    }
}
