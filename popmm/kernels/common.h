/* What the C kernels share. */
#include <stdint.h>
#include <string.h>

/* float16, finite; by no denormal float, which a process may have set to count as zero */
static inline float from_half(uint16_t h) {
    const uint32_t size = h & 0x7fff, bits = (size << 13) + (112u << 23);
    float f;
    memcpy(&f, &bits, 4);
    f = size < 0x400 ? (float)(int32_t)size * 0x1p-24f : f;
    return h & 0x8000 ? -f : f;
}

/* place of the first index that names nothing, -1 if all name something */
static inline int64_t first_outside(const int64_t *index, int64_t n, int64_t end) {
    int64_t outside = 0;
    for (int64_t i = 0; i < n; i++) outside |= (uint64_t)index[i] >= (uint64_t)end;
    for (int64_t i = 0; outside && i < n; i++)
        if ((uint64_t)index[i] >= (uint64_t)end) return i;
    return -1;
}

/* the k-th highest of the n numbers in v, whose order changes; k counts from 0 */
static inline uint32_t kth_highest(uint32_t *v, int64_t n, int64_t k) {
    int64_t low = 0, high = n - 1;
    while (low < high) { /* Hoare's selection */
        const uint32_t pivot = v[low + (high - low) / 2];
        int64_t i = low - 1, j = high + 1;
        for (;;) {
            do i++; while (v[i] > pivot);
            do j--; while (v[j] < pivot);
            if (i >= j) break;
            const uint32_t swap = v[i];
            v[i] = v[j], v[j] = swap;
        }
        if (k <= j) high = j;
        else low = j + 1;
    }
    return v[k];
}
