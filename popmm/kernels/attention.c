/* Attention of a few queries per head over a key-value cache, read where it lies; keys that the mask leaves out are not read. */
#include "common.h"
#include "operators.h"

#define KNOWN static inline __attribute__((always_inline)) /* `narrow` and widths are known where these are compiled */

/* number i of keys or values, which are bfloat16 if narrow */
KNOWN float number(const void *x, int64_t i, int narrow) {
    if (!narrow) return ((const float *)x)[i];
    const uint32_t bits = (uint32_t)((const uint16_t *)x)[i] << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

/* a head's query over its keys and values, each a row of `k` or `v` per token, `k_step` or `v_step` numbers apart */
typedef struct {
    const float *q;
    const void *k, *v, *mask;
    int64_t tokens, d, d_value, k_step, v_step, m_step;
    int mask_kind;
    float scale, *score, *to;
} head;

static inline float added(const head *own, int64_t t) { /* to a product; -INFINITY leaves the token out */
    const int64_t m = t * own->m_step;
    if (own->mask_kind == 1) return ((const uint8_t *)own->mask)[m] ? 0 : -INFINITY;
    return own->mask_kind == 2 ? ((const float *)own->mask)[m] : 0;
}

/* the products' exponentials, of which the highest is 1; their sum */
static float exponentials(float *score, int64_t n) {
    float most = -INFINITY, total = 0;
    for (int64_t t = 0; t < n; t++) most = score[t] > most ? score[t] : most;
    if (most == -INFINITY) most = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t t = 0; t < n; t++) {
        score[t] = score[t] == -INFINITY ? 0 : exponential(score[t] - most);
        total += score[t];
    }
    return total;
}

/* what comes of the keys: score[tokens], -INFINITY of those left out, whose keys are not read */
KNOWN void products(const head *own, int narrow) {
    for (int64_t t = 0; t < own->tokens; t++) {
        const float more = added(own, t);
        float sum = 0;
        if (more != -INFINITY) {
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < own->d; i++) sum += own->q[i] * number(own->k, t * own->k_step + i, narrow);
        }
        own->score[t] = sum * own->scale + more;
    }
}

/* to[d_value] = by * sum over tokens of score * value */
KNOWN void mean(const head *own, float by, int narrow) {
    memset(own->to, 0, own->d_value * sizeof(float));
    for (int64_t t = 0; t < own->tokens; t++) {
        const float p = own->score[t] * by;
        if (p == 0) continue; /* nothing was ever written there, perhaps */
#pragma omp simd
        for (int64_t i = 0; i < own->d_value; i++) own->to[i] += p * number(own->v, t * own->v_step + i, narrow);
    }
}

#ifdef SIXTEEN
KNOWN __m512 sixteen(const void *x, int64_t i, int narrow) {
    if (!narrow) return _mm512_loadu_ps((const float *)x + i);
    const __m256i own = _mm256_loadu_si256((const __m256i *)((const uint16_t *)x + i));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(own), 16));
}

/* `products` of d, a multiple of 16, of four tokens at a time, for which the query is loaded once */
KNOWN void products16(const head *own, int64_t d, int narrow) {
    for (int64_t t = 0; t < own->tokens; t += 4) {
        float more[4], found[4], most = -INFINITY;
        int64_t k[4];
        for (int j = 0; j < 4; j++) {
            const int64_t at = t + j < own->tokens ? t + j : own->tokens - 1;
            more[j] = added(own, at), k[j] = at * own->k_step;
            most = more[j] > most ? more[j] : most;
        }
        __m512 sum[4];
        for (int j = 0; j < 4; j++) sum[j] = _mm512_setzero_ps();
        for (int64_t i = 0; i < d && most != -INFINITY; i += 16) {
            const __m512 q = _mm512_loadu_ps(own->q + i);
            for (int j = 0; j < 4; j++) sum[j] = _mm512_fmadd_ps(q, sixteen(own->k, k[j] + i, narrow), sum[j]);
        }
        _mm_storeu_ps(found, sums4(sum[0], sum[1], sum[2], sum[3]));
        for (int j = 0; j < 4 && t + j < own->tokens; j++)
            own->score[t + j] = more[j] == -INFINITY ? -INFINITY : found[j] * own->scale + more[j];
    }
}

#define COLUMNS 128 /* whose sums stay in registers */
/* `mean` of the n columns from `from` on, a multiple of 16 */
KNOWN void mean16(const head *own, int64_t from, int64_t n, float by, int narrow) {
    __m512 sum[COLUMNS / 16];
    for (int64_t i = 0; i < n / 16; i++) sum[i] = _mm512_setzero_ps();
    for (int64_t t = 0; t < own->tokens; t++) {
        if (own->score[t] == 0) continue;
        const __m512 p = _mm512_set1_ps(own->score[t] * by);
        for (int64_t i = 0; i < n / 16; i++)
            sum[i] = _mm512_fmadd_ps(p, sixteen(own->v, t * own->v_step + from + 16 * i, narrow), sum[i]);
    }
    for (int64_t i = 0; i < n / 16; i++) _mm512_storeu_ps(own->to + from + 16 * i, sum[i]);
}
#endif

KNOWN void attend_head(const head *own, int narrow) {
    int wide = 0;
#ifdef SIXTEEN
    wide = own->d % 16 == 0 && own->d_value % 16 == 0;
    if (wide && own->d == 64) products16(own, 64, narrow);
    else if (wide && own->d == 128) products16(own, 128, narrow);
    else if (wide) products16(own, own->d, narrow);
#endif
    if (!wide) products(own, narrow);
    const float total = exponentials(own->score, own->tokens), by = total > 0 ? 1 / total : 0;
    if (!wide) mean(own, by, narrow);
#ifdef SIXTEEN
    for (int64_t from = 0, left = own->d_value; wide && left > 0; from += COLUMNS, left -= COLUMNS) {
        if (left >= COLUMNS) mean16(own, from, COLUMNS, by, narrow);
        else if (left == 64) mean16(own, from, 64, by, narrow);
        else mean16(own, from, left, by, narrow);
    }
#endif
}

/* y[batch, n, heads, d_value] of q[batch, heads, n, d], float32; keys and values of `shared` heads each, float32 or bfloat16.
 *
 * Strides, in elements: of k and v by batch, head and token. mask: NULL, or by batch, head, query and token with its strides,
 * bytes (kind 1: 0 leaves the token out) or float32 that is added (kind 2). work: batch * heads * n * tokens floats. A query
 * whose tokens are all left out gets zeros. */
void attend(const float *q, const void *k, const void *v, int narrow, int64_t batch, int64_t heads, int64_t shared, int64_t n,
            int64_t tokens, int64_t d, int64_t d_value, const int64_t *k_strides, const int64_t *v_strides, const void *mask,
            int mask_kind, const int64_t *mask_strides, float scale, float *work, float *y, int threads) {
    const int64_t size = narrow ? 2 : 4, masked = mask_kind == 2 ? 4 : 1;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < batch * heads * n; i++) {
        const int64_t b = i / (heads * n), h = i / n % heads, t = i % n, of = h / (heads / shared);
        const int64_t of_mask = b * mask_strides[0] + h * mask_strides[1] + t * mask_strides[2];
        const head own = {.q = q + i * d,
                          .k = (const char *)k + (b * k_strides[0] + of * k_strides[1]) * size,
                          .v = (const char *)v + (b * v_strides[0] + of * v_strides[1]) * size,
                          .mask = mask ? (const char *)mask + of_mask * masked : NULL,
                          .tokens = tokens, .d = d, .d_value = d_value,
                          .k_step = k_strides[2], .v_step = v_strides[2], .m_step = mask_strides[3],
                          .mask_kind = mask ? mask_kind : 0, .scale = scale, .score = work + i * tokens,
                          .to = y + ((b * n + t) * heads + h) * d_value};
        if (narrow) attend_head(&own, 1);
        else attend_head(&own, 0);
    }
}
