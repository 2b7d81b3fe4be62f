/* Products with chosen rows of a matrix, read where they lie.
 *
 * Rows are float32 or bfloat16 (kind 0 or 1), `d` contiguous elements each, `stride` elements apart. Indexes
 * are int64. Accumulation is float32. Outputs are written whole, in an order that does not depend on
 * the number of threads.
 */
#include <stdint.h>
#include <string.h>

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

/* `next` is the row read after this one: its lines are fetched meanwhile, since chosen rows form no pattern */
static inline float dot(const void *row, const char *next, int kind, const float *x, int64_t d) {
    lanes a = {0}, b = {0}, c = {0}, e = {0};
    int64_t i = 0;
    for (; i + 4 * LANES <= d; i += 4 * LANES) {
        for (int64_t line = 0; line < 4 * LANES * (kind ? 2 : 4); line += LINE)
            __builtin_prefetch(next + i * (kind ? 2 : 4) + line, 0, 3);
        a += load(row, kind, i) * *(const lanes *)(x + i);
        b += load(row, kind, i + LANES) * *(const lanes *)(x + i + LANES);
        c += load(row, kind, i + 2 * LANES) * *(const lanes *)(x + i + 2 * LANES);
        e += load(row, kind, i + 3 * LANES) * *(const lanes *)(x + i + 3 * LANES);
    }
    a += b + c + e;
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += a[lane];
    for (; i < d; i++) sum += single(row, kind, i) * x[i];
    return sum;
}

static inline void add(float *y, const void *row, const char *next, int kind, float h, int64_t d) {
    int64_t i = 0;
    for (; i + 2 * LANES <= d; i += 2 * LANES) {
        for (int64_t line = 0; line < 2 * LANES * (kind ? 2 : 4); line += LINE)
            __builtin_prefetch(next + i * (kind ? 2 : 4) + line, 0, 3);
        *(lanes *)(y + i) += h * load(row, kind, i);
        *(lanes *)(y + i + LANES) += h * load(row, kind, i + LANES);
    }
    for (; i < d; i++) y[i] += h * single(row, kind, i);
}

/* out[n, k] = rows[index[n, k]] . x[n] */
void gather_dot(const void *rows, int kind, int64_t stride, int64_t d, const int64_t *index, int64_t n, int64_t k,
                const float *x, float *out) {
    const char *base = rows;
    const int64_t step = stride * (kind ? 2 : 4), last = n * k - 1;
#pragma omp parallel for schedule(static)
    for (int64_t j = 0; j <= last; j++) {
        const char *row = base + index[j] * step, *next = base + index[j < last ? j + 1 : j] * step;
        const float *own = x + (j / k) * d;
        out[j] = kind ? dot(row, next, 1, own, d) : dot(row, next, 0, own, d);
    }
}

/* parts[p, n, d] = sum over the p-th share of k of h[n, k] * rows[index[n, k]] */
void gather_sum(const void *rows, int kind, int64_t stride, int64_t d, const int64_t *index, int64_t n, int64_t k,
                const float *h, int64_t n_parts, float *parts) {
    const char *base = rows;
    const int64_t step = stride * (kind ? 2 : 4);
#pragma omp parallel for schedule(static) collapse(2)
    for (int64_t p = 0; p < n_parts; p++) {
        for (int64_t t = 0; t < n; t++) {
            float *y = parts + (p * n + t) * d;
            const int64_t end = t * k + (p + 1) * k / n_parts;
            memset(y, 0, d * sizeof(float));
            for (int64_t j = t * k + p * k / n_parts; j < end; j++) {
                const char *row = base + index[j] * step, *next = base + index[j + 1 < end ? j + 1 : j] * step;
                if (kind) add(y, row, next, 1, h[j], d);
                else add(y, row, next, 0, h[j], d);
            }
        }
    }
}

typedef uint8_t ubytes16 __attribute__((vector_size(16), aligned(1)));
typedef int32_t ints __attribute__((vector_size(64)));

/* unsigned bytes, less `zero`: in two steps, since GCC takes sixteen for one, and sixteen for signed bytes */
static inline lanes to_floats(ubytes16 c, int32_t zero) {
    return __builtin_convertvector(__builtin_convertvector(c, ints) - zero, lanes);
}

/* one group's products, lane by lane; what does not fill the lanes is added to `rest` */
static inline lanes group_dot(const uint8_t *c, int bits, const float *x, int64_t group, float *rest) {
    lanes low = {0}, high = {0};
    const int64_t n = bits == 8 ? group : group / 2;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        if (bits == 8) {
            low += to_floats(*(const ubytes16 *)(c + i) ^ 128, 128) * *(const lanes *)(x + i);
        } else { /* the first half of a group in the low nibbles, the second in the high ones */
            const ubytes16 both = *(const ubytes16 *)(c + i);
            low += to_floats(both & 15, 8) * *(const lanes *)(x + i);
            high += to_floats(both >> 4, 8) * *(const lanes *)(x + n + i);
        }
    }
    *rest = 0;
    for (; i < n; i++) {
        if (bits == 8) *rest += (float)(int8_t)c[i] * x[i];
        else *rest += (float)((c[i] & 15) - 8) * x[i] + (float)((c[i] >> 4) - 8) * x[n + i];
    }
    return low + high;
}

/* float16, not negative */
static inline float from_half(uint16_t h) {
    const uint32_t bits = (uint32_t)h << 13;
    float f;
    memcpy(&f, &bits, 4);
    return f * 0x1p112f;
}

static inline float quantised_row(const uint8_t *c, const uint16_t *scale, int bits, const float *x, int64_t groups,
                                  int64_t group) {
    lanes total = {0};
    float sum = 0, rest;
    for (int64_t g = 0; g < groups; g++) {
        const float s = from_half(scale[g]);
        total += s * group_dot(c + g * (group * bits / 8), bits, x + g * group, group, &rest);
        sum += s * rest;
    }
    for (int lane = 0; lane < LANES; lane++) sum += total[lane];
    return sum;
}

/* out[n, r] = sum over groups of scale[row, group] * (codes[row, group] . x[n, group]), row = block[n] * n_rows + r */
void quantised_dot(const uint8_t *codes, const uint16_t *scale, int bits, int64_t n_rows, int64_t d, int64_t group,
                   const float *x, const int64_t *block, int64_t n, float *out) {
    const int64_t groups = d / group, bytes = d * bits / 8;
#pragma omp parallel for schedule(static) collapse(2)
    for (int64_t t = 0; t < n; t++) {
        for (int64_t r = 0; r < n_rows; r++) {
            const int64_t row = block[t] * n_rows + r;
            const uint8_t *c = codes + row * bytes;
            const uint16_t *s = scale + row * groups;
            const float *own = x + t * d;
            float sum;
            /* the usual sizes as constants, so that the loops unroll */
            if (bits == 4 && group == 64) sum = quantised_row(c, s, 4, own, groups, 64);
            else if (bits == 8 && group == 64) sum = quantised_row(c, s, 8, own, groups, 64);
            else sum = quantised_row(c, s, bits, own, groups, group);
            out[t * n_rows + r] = sum;
        }
    }
}

/* index[n, k]: places of the k highest of score[n, u], rising; ties go to the lower place. `work` holds u floats. */
void choose(const float *score, int64_t n, int64_t u, int64_t k, float *work, int64_t *index) {
    for (int64_t t = 0; t < n; t++) {
        const float *own = score + t * u;
        memcpy(work, own, u * sizeof(float));
        int64_t low = 0, high = u - 1, above = 0, taken = 0;
        while (low < high) { /* Hoare's selection of the k-th highest */
            const float pivot = work[low + (high - low) / 2];
            int64_t i = low - 1, j = high + 1;
            for (;;) {
                do i++; while (work[i] > pivot);
                do j--; while (work[j] < pivot);
                if (i >= j) break;
                const float swap = work[i];
                work[i] = work[j];
                work[j] = swap;
            }
            if (k - 1 <= j) high = j;
            else low = j + 1;
        }
        const float least = work[k - 1];
        for (int64_t i = 0; i < u; i++) above += own[i] > least;
        int64_t ties = k - above, *out = index + t * k;
        for (int64_t i = 0; i < u && taken < k; i++)
            if (own[i] > least || (own[i] == least && ties-- > 0)) out[taken++] = i;
        while (taken < k) out[taken++] = 0; /* scores that are no numbers must not read foreign memory */
    }
}
