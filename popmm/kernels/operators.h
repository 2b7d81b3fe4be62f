/* What the native operators call of the C kernels, in both languages. */
#ifndef POPMM_OPERATORS_H
#define POPMM_OPERATORS_H
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* a linear layer whose rows lie in planes; the bias may be NULL */
typedef struct {
    const void *planes[4];
    int64_t n_rows, d, group;
    int bits;
    const float *bias;
} layer;
int64_t layers_dot(const layer *layers, int64_t n_layers, int64_t n, const float *x, float *out, int threads);
int64_t tiers_ffn(const void *const *gate, const void *const *up, const void *const *down, int64_t n_rows, int64_t d,
                  int64_t group, int64_t d_ff, const float *rms, const float *norm, const float *gate_bias,
                  const float *up_bias, int activation, int64_t n_tiers, const int64_t *bits, const int64_t *count,
                  const int64_t *first, const float *votes, int64_t n, const float *x, float *y, int64_t *index, int threads);
void attend(const float *q, const void *k, const void *v, int narrow, int64_t batch, int64_t heads, int64_t shared, int64_t n,
            int64_t tokens, int64_t d, int64_t d_value, const int64_t *k_strides, const int64_t *v_strides, const void *mask,
            int mask_kind, const int64_t *mask_strides, float scale, float *work, float *y, int threads);
void few_linear(const uint16_t *w, int64_t n_rows, int64_t stride, int64_t d, const uint16_t *x, int64_t n, const float *bias,
                uint16_t *work, float *out, int threads);

#ifdef __cplusplus
}
#endif
#endif
