/* Attention of one query per head over a key-value cache, read where it lies; keys that the mask leaves out are not read. */
#include "common.h"
#include "operators.h"

#include <math.h>

static inline float from_bfloat16(uint16_t b) {
    const uint32_t bits = (uint32_t)b << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

#define ROWS_OF(NAME, TYPE, LOAD)                                                                                    \
    static inline float dot_##NAME(const float *q, const TYPE *k, int64_t d) {                                       \
        float sum = 0;                                                                                               \
        _Pragma("omp simd reduction(+ : sum)") for (int64_t i = 0; i < d; i++) sum += q[i] * LOAD(k[i]);             \
        return sum;                                                                                                  \
    }                                                                                                                \
    static inline void add_##NAME(float *y, float p, const TYPE *v, int64_t d) {                                     \
        _Pragma("omp simd") for (int64_t i = 0; i < d; i++) y[i] += p * LOAD(v[i]);                                  \
    }
#define AS_IT_IS(x) (x)
ROWS_OF(float, float, AS_IT_IS)
ROWS_OF(bfloat16, uint16_t, from_bfloat16)

/* y[batch, heads, d_value] of q[batch, heads, d], float32; keys and values of `shared` heads each, float32 or bfloat16.
 *
 * Strides, in elements: of k and v by batch, head and token. mask: NULL, or by batch, head and token with its strides, bytes
 * (kind 1: 0 leaves the token out) or float32 that is added (kind 2). work: batch * heads * tokens floats. A query whose
 * tokens are all left out gets zeros. */
void attend(const float *q, const void *k, const void *v, int narrow, int64_t batch, int64_t heads, int64_t shared,
            int64_t tokens, int64_t d, int64_t d_value, const int64_t *k_strides, const int64_t *v_strides, const void *mask,
            int mask_kind, const int64_t *mask_strides, float scale, float *work, float *y, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t own = 0; own < batch * heads; own++) {
        const int64_t b = own / heads, h = own % heads, of = h / (heads / shared);
        const int64_t k_first = b * k_strides[0] + of * k_strides[1], v_first = b * v_strides[0] + of * v_strides[1];
        const int64_t m_first = mask ? b * mask_strides[0] + h * mask_strides[1] : 0;
        float *const score = work + own * tokens, *const to = y + own * d_value;
        float most = -INFINITY, total = 0;
        for (int64_t t = 0; t < tokens; t++) {
            const int64_t m = m_first + (mask ? t * mask_strides[2] : 0);
            const float added = mask_kind == 2 ? ((const float *)mask)[m] : 0;
            if ((mask_kind == 1 && !((const uint8_t *)mask)[m]) || added == -INFINITY) {
                score[t] = -INFINITY;
                continue;
            }
            const int64_t at = k_first + t * k_strides[2];
            const float product = narrow ? dot_bfloat16(q + own * d, (const uint16_t *)k + at, d)
                                         : dot_float(q + own * d, (const float *)k + at, d);
            score[t] = product * scale + added;
            most = score[t] > most ? score[t] : most;
        }
        memset(to, 0, d_value * sizeof(float));
        for (int64_t t = 0; t < tokens; t++) {
            if (score[t] == -INFINITY) continue;
            const float p = expf(score[t] - most);
            const int64_t at = v_first + t * v_strides[2];
            total += p;
            if (narrow) add_bfloat16(to, p, (const uint16_t *)v + at, d_value);
            else add_float(to, p, (const float *)v + at, d_value);
        }
        for (int64_t i = 0; i < d_value && total > 0; i++) to[i] /= total;
    }
}
