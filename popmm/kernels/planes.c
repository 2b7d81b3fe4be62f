/* Products with chosen rows in nested planes.
 *
 * Vectors that rows are multiplied with are rounded to 8 bits, one scale per group, so that integers are multiplied; sums of
 * rows take their factors in 8 bits per group and TILE rows, twice over (15 bits) for rows of more than their base's bits.
 * Integers are added exactly, floats in an order that does not depend on the number of threads.
 */
#include "operators.h"
#include "planes.h"

#include <omp.h>

#if defined(SIXTEEN) && defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__) && !defined(POPMM_AVX2)
#include "planes_avx512.h"
#elif defined(__AVX2__) && defined(__F16C__) && defined(__FMA__)
#include "planes_avx2.h"
#endif

int new_rounded(int64_t d, int64_t group, rounded *x) {
    const int64_t groups = (d / group + 15) / 16 * 16;
    x->code = malloc(d + 2 * groups * sizeof(float) + 64);
    if (!x->code) return 0;
    x->step = (float *)(((uintptr_t)x->code + d + 63) / 64 * 64);
    x->total = x->step + groups;
    memset(x->step, 0, 2 * groups * sizeof(float));
    return 1;
}

rounded *new_rounded_all(int64_t d, int64_t group, int64_t n) {
    rounded *x = calloc(n ? n : 1, sizeof(rounded));
    for (int64_t t = 0; x && t < n; t++)
        if (!new_rounded(d, group, x + t)) {
            free_rounded(x, n);
            return NULL;
        }
    return x;
}

void free_rounded(rounded *x, int64_t n) {
    for (int64_t t = 0; x && t < n; t++) free(x[t].code);
    free(x);
}

void round_vector(const float *x, int64_t d, int64_t group, rounded *to) {
    for (int64_t g = 0; g < d / group; g++) {
        const float *own = x + g * group;
        float most = 0;
        int finite = 1;
        for (int64_t i = 0; i < group; i++) {
            most = fabsf(own[i]) > most ? fabsf(own[i]) : most;
            finite &= own[i] - own[i] == 0;
        }
        if (!finite) { /* no number: nor is what it is multiplied with */
            memset(to->code + g * group, 0, group);
            to->step[g] = to->total[g] = NAN;
            continue;
        }
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

static float dot_plain(const planes *p, int64_t row, int bits, const rounded *x) {
    float sum = 0;
    for (int64_t g = 0; g < p->d / p->group; g++) {
        int32_t part = 0;
        for (int64_t i = 0; i < p->group; i++) part += number(p, row, bits, g, i) * x->code[g * p->group + i];
        sum += from_half(p->scale[row * (p->d / p->group) + g]) * (x->step[g] * part - middle_of(p, bits) * x->total[g]);
    }
    return sum / cells(bits);
}

static void add_plain(const planes *p, int bits, int64_t first, const int64_t *index, const float *h, int64_t k, int64_t from,
                      int64_t to, float *y) {
    for (int64_t j = 0; j < k; j++) {
        const int64_t row = first + index[j];
        for (int64_t g = from; g < to; g++) {
            const float f = h[j] * from_half(p->scale[row * (p->d / p->group) + g]) / cells(bits);
            for (int64_t i = 0; i < p->group; i++) y[g * p->group + i] += f * (number(p, row, bits, g, i) - middle_of(p, bits));
        }
    }
}

/* calls f with bits known where it is compiled */
#define BY_BITS(f, ...)                         \
    switch (bits) {                             \
    case 3: f(3, __VA_ARGS__); break;           \
    case 4: f(4, __VA_ARGS__); break;           \
    case 5: f(5, __VA_ARGS__); break;           \
    case 6: f(6, __VA_ARGS__); break;           \
    case 7: f(7, __VA_ARGS__); break;           \
    default: f(8, __VA_ARGS__);                 \
    }

#define TOGETHER 32 /* rows that are read for one token after the other, while they are near */

#ifdef VECTORS
/* rows j, j + 1, ... of k, of which there are so many, and those that come so far `ahead` of them */
static inline void numbered(int64_t first, const int64_t *index, int64_t j, int64_t k, int rows, int64_t ahead, int64_t *now,
                            int64_t *next) {
    for (int r = 0; r < rows; r++) {
        const int64_t a = j + r < k ? j + r : k - 1, b = j + ahead + r < k ? j + ahead + r : k - 1;
        now[r] = first + (index ? index[a] : a), next[r] = first + (index ? index[b] : b);
    }
}

#ifdef MOST_VECTORS
/* out[t * stride + j] of `rows` rows at a time and m vectors, both known where this is compiled */
static inline __attribute__((always_inline)) void some_dots(int bits, const planes *p, int64_t first, const int64_t *index,
                                                            int64_t j, int64_t to, int64_t k, int rows, const rounded *x, int m,
                                                            float *out, int64_t stride) {
    int64_t now[AT_ONCE], next[AT_ONCE];
    float found[AT_ONCE][MOST_VECTORS];
    numbered(first, index, j, k, rows, ahead(p), now, next);
    dots(p, now, next, rows, bits, x, m, found);
    for (int t = 0; t < m; t++)
        for (int r = 0; r < rows && j + r < to; r++) out[t * stride + j + r] = found[r][t];
}

static inline __attribute__((always_inline)) void dots_of(int bits, const planes *p, int64_t first, const int64_t *index,
                                                          int64_t from, int64_t to, int64_t k, const rounded *x, int64_t m,
                                                          float *out, int64_t stride) {
    for (int64_t j = from; j < to && j < from + ahead(p); j++)
        for (int64_t g = 0; g < p->d / 64; g += 2) fetch(p, place(p, first + (index ? index[j] : j), g), bits);
    if (m == 1) {
        for (int64_t j = from; j < to; j += AT_ONCE) some_dots(bits, p, first, index, j, to, k, AT_ONCE, x, 1, out, stride);
        return;
    }
    for (int64_t j = from; j < to; j += PAIR) {
        int64_t t = 0;
        for (; t + 8 <= m; t += 8) some_dots(bits, p, first, index, j, to, k, PAIR, x + t, 8, out + t * stride, stride);
        for (; t + 4 <= m; t += 4) some_dots(bits, p, first, index, j, to, k, PAIR, x + t, 4, out + t * stride, stride);
        for (; t + 2 <= m; t += 2) some_dots(bits, p, first, index, j, to, k, PAIR, x + t, 2, out + t * stride, stride);
        if (t < m) some_dots(bits, p, first, index, j, to, k, PAIR, x + t, 1, out + t * stride, stride);
    }
}

static inline __attribute__((always_inline)) void tiles_of(int bits, const planes *p, int64_t first, const int64_t *index,
                                                           const float *h, int64_t stride, int64_t k, int64_t m, int64_t from,
                                                           int64_t to, float *y) {
    for (int64_t t = 0; t < m; t += MOST_VECTORS)
        add_tiles(p, bits, first, index, h + t * stride, stride, k, m - t < MOST_VECTORS ? m - t : MOST_VECTORS, from, to,
                  y + t * p->d);
}
#else
static inline __attribute__((always_inline)) void dots_of(int bits, const planes *p, int64_t first, const int64_t *index,
                                                          int64_t from, int64_t to, int64_t k, const rounded *x, int64_t m,
                                                          float *out, int64_t stride) {
    for (int64_t start = from, step = m > 1 ? TOGETHER : to - from; start < to; start += step)
        for (int64_t t = 0; t < m; t++)
            for (int64_t j = start; j < start + step && j < to; j += AT_ONCE) {
                int64_t now[AT_ONCE], next[AT_ONCE];
                float found[AT_ONCE];
                numbered(first, index, j, k, AT_ONCE, ahead(p), now, next);
                dots(p, now, next, bits, x + t, found);
                for (int r = 0; r < AT_ONCE && j + r < to; r++) out[t * stride + j + r] = found[r];
            }
}

static inline __attribute__((always_inline)) void tiles_of(int bits, const planes *p, int64_t first, const int64_t *index,
                                                           const float *h, int64_t stride, int64_t k, int64_t m, int64_t from,
                                                           int64_t to, float *y) {
    for (int64_t r = 0, step = m > 1 ? TOGETHER : k; r < k; r += step)
        for (int64_t t = 0; t < m; t++)
            add_tiles(p, bits, first, index + r, h + t * stride + r, r + step < k ? step : k - r, from, to, y + t * p->d);
}
#endif
#endif

void rows_dot(const planes *p, int bits, int64_t first, const int64_t *index, int64_t k, const rounded *x, int64_t m, float *out,
              int64_t stride, range own) {
    if (!p->fine) bits = 4; /* rows of one plane */
#ifdef VECTORS
    if (p->group == 64) {
        BY_BITS(dots_of, p, first, index, own.from, own.to, k, x, m, out, stride)
        return;
    }
#endif
    for (int64_t j = own.from; j < own.to; j++)
        for (int64_t t = 0; t < m; t++) out[t * stride + j] = dot_plain(p, first + (index ? index[j] : j), bits, x + t);
}

/* y[t, d] += sum of h[t * stride + j] * row[index[j]] for a range of the j and of the groups of columns, and m sums */
static void rows_add(const planes *p, int bits, int64_t first, const int64_t *index, const float *h, int64_t stride, range rows,
                     int64_t m, float *y, range groups) {
    if (!p->fine) bits = 4;
    const int64_t k = rows.to - rows.from;
    index += rows.from, h += rows.from;
#ifdef VECTORS
    if (p->group == 64) {
        BY_BITS(tiles_of, p, first, index, h, stride, k, m, groups.from, groups.to, y)
        return;
    }
#endif
    for (int64_t t = 0; t < m; t++) add_plain(p, bits, first, index, h + t * stride, k, groups.from, groups.to, y + t * p->d);
}

/* Threads that outnumber the parts share the columns too. */
static inline int64_t columns(int64_t threads) { return threads % PARTS ? threads : threads / PARTS; }

void tiers_add(const planes *p, int64_t n_tiers, const int64_t *bits, const int64_t *count, int64_t first, const int64_t *index,
               const float *h, int64_t stride, int64_t m, float *sums, float *y, part whose) {
    const int64_t groups = p->d / p->group, wide = columns(whose.all);
    for (int64_t unit = whose.me; unit < PARTS * wide; unit += whose.all) {
        const part own = {unit % PARTS, PARTS};
        const range mine = share(groups, 1, (part){unit / PARTS, wide});
        float *const to = sums + own.me * m * p->d;
        for (int64_t t = 0; t < m; t++)
            memset(to + t * p->d + mine.from * p->group, 0, (mine.to - mine.from) * p->group * sizeof(float));
        for (int64_t i = 0, at = 0; i < n_tiers; at += count[i++])
            rows_add(p, (int)bits[i], first, index + at, h + at, stride, share(count[i], TILE, own), m, to, mine);
    }
#pragma omp barrier
    const range mine = share(groups, 1, whose);
    for (int64_t t = 0; t < m; t++)
        for (int64_t i = mine.from * p->group; i < mine.to * p->group; i++) {
            float sum = 0;
            for (int64_t k = 0; k < PARTS; k++) sum += sums[(k * m + t) * p->d + i];
            y[t * p->d + i] = sum;
        }
}

static inline uint16_t to_bfloat16(float f) { /* finite, to nearest even */
    uint32_t u;
    memcpy(&u, &f, 4);
    return (u + 0x7fff + (u >> 16 & 1)) >> 16;
}

static inline __attribute__((always_inline)) void decode_of(int bits, const planes *p, int64_t from, int64_t to, int narrow,
                                                            void *out) {
    const int64_t groups = p->d / p->group;
    const float middle = middle_of(p, bits);
    for (int64_t row = from; row < to; row++)
        for (int64_t g = 0; g < groups; g++) {
            uint8_t u[64];
#ifdef VECTORS
            if (p->group == 64) numbers_to(p, row, bits, g, u);
            else
#endif
                for (int64_t i = 0; i < p->group; i++) u[i] = (uint8_t)number(p, row, bits, g, i);
            const float scale = from_half(p->scale[row * groups + g]) / cells(bits);
            const int64_t at = row * p->d + g * p->group;
            if (narrow)
                for (int64_t i = 0; i < p->group; i++) ((uint16_t *)out)[at + i] = to_bfloat16((u[i] - middle) * scale);
            else
                for (int64_t i = 0; i < p->group; i++) ((float *)out)[at + i] = (u[i] - middle) * scale;
        }
}

/* ---- what Python calls ---- */

static inline part me(void) { return (part){omp_get_thread_num(), omp_get_num_threads()}; }

/* out[n, k] = rows[index[n, k]] . x[n]; index NULL: the first k rows */
int64_t planes_dot(const uint8_t *base, const uint8_t *fine, const uint8_t *finest, const uint16_t *scale, int64_t n_rows,
                   int64_t d, int64_t group, int bits, const int64_t *index, int64_t n, int64_t k, const float *x, float *out,
                   int threads) {
    const planes p = {base, fine, finest, scale, n_rows, d, group, bits & PLAIN};
    bits = number_of(bits);
    const int64_t outside = index ? first_outside(index, n * k, n_rows) : -1;
    if (outside >= 0) return outside;
    rounded own;
    if (!new_rounded(d, group, &own)) return OUT_OF_MEMORY;
    for (int64_t t = 0; t < n; t++) {
        round_vector(x + t * d, d, group, &own);
#pragma omp parallel num_threads(threads)
        rows_dot(&p, bits, 0, index ? index + t * k : NULL, k, &own, 1, out + t * k, 0, share(k, 4, me()));
    }
    free(own.code);
    return -1;
}

/* out[n, rows of all layers] of x[n, d]: layers of one d and group, at one call */
int64_t layers_dot(const layer *layers, int64_t n_layers, int64_t n, const float *x, float *out, int threads) {
    const int64_t d = layers[0].d, group = layers[0].group;
    const layer *const end = layers + n_layers;
    int64_t all = 0;
    for (const layer *l = layers; l < end; l++) all += l->n_rows;
    rounded *own = new_rounded_all(d, group, n);
    if (!own) return OUT_OF_MEMORY;
    for (int64_t t = 0; t < n; t++) round_vector(x + t * d, d, group, own + t);
#pragma omp parallel num_threads(threads)
    {
        float *to = out;
        for (const layer *l = layers; l < end; to += l++->n_rows) {
            const planes p = {l->planes[0], l->planes[1], l->planes[2], l->planes[3], l->n_rows, d, group, l->bits & PLAIN};
            rows_dot(&p, number_of(l->bits), 0, NULL, l->n_rows, own, n, to, all, share(l->n_rows, 4, me()));
        }
    }
    for (int64_t t = 0; t < n; t++)
        for (const layer *l = layers; l < end; out += l++->n_rows)
            for (int64_t i = 0; l->bias && i < l->n_rows; i++) out[i] += l->bias[i];
    free_rounded(own, n);
    return -1;
}

/* out[n, d] = sum over k of h[n, k] * rows[index[n, k]] */
int64_t planes_add(const uint8_t *base, const uint8_t *fine, const uint8_t *finest, const uint16_t *scale, int64_t n_rows,
                   int64_t d, int64_t group, int bits, const int64_t *index, int64_t n, int64_t k, const float *h, float *out,
                   int threads) {
    const planes p = {base, fine, finest, scale, n_rows, d, group, bits & PLAIN};
    bits = number_of(bits);
    const int64_t outside = first_outside(index, n * k, n_rows);
    if (outside >= 0) return outside;
    float *const sums = malloc(PARTS * d * sizeof(float));
    if (!sums) return OUT_OF_MEMORY;
    for (int64_t t = 0; t < n; t++) {
#pragma omp parallel num_threads(threads)
        tiers_add(&p, 1, &(int64_t){bits}, &k, 0, index + t * k, h + t * k, 0, 1, sums, out + t * d, me());
    }
    free(sums);
    return -1;
}

/* all rows, in float32, or bfloat16 if narrow; groups of at most 64 */
void planes_decode(const uint8_t *base, const uint8_t *fine, const uint8_t *finest, const uint16_t *scale, int64_t n_rows,
                   int64_t d, int64_t group, int bits, int narrow, void *out, int threads) {
    const planes p = {base, fine, finest, scale, n_rows, d, group, bits & PLAIN};
    bits = number_of(bits);
#pragma omp parallel num_threads(threads)
    {
        const range own = share(n_rows, 1, me());
        BY_BITS(decode_of, &p, own.from, own.to, narrow, out)
    }
}
