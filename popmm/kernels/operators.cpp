/* The C kernels as operators of torch's dispatcher, by its stable ABI: a call costs 3 microseconds, and compiled code makes
 * it without Python. Weights are named by handles, for they stay where they are; a handle is never given out twice. */
#include "operators.h"
#include "program.hpp"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

struct FFN {
    const void *parts[3][4];
    bool gated;
    int64_t n_rows, d, group, d_ff;
    const float *rms, *norm, *gate_bias, *up_bias;
    int activation;
    std::vector<int64_t> bits, count;
    int64_t read;
};

template <typename T> class Table {
  public:
    int64_t add(T *entry) {
        std::lock_guard<std::mutex> lock(mutex);
        entries.push_back(entry);
        return (int64_t)entries.size() - 1;
    }
    void remove(int64_t handle) {
        std::lock_guard<std::mutex> lock(mutex);
        delete entries[handle];
        entries[handle] = nullptr;
    }
    const T &at(int64_t handle) {
        std::lock_guard<std::mutex> lock(mutex);
        const bool known = handle >= 0 && handle < (int64_t)entries.size() && entries[handle];
        STD_TORCH_CHECK(known, "popmm: these weights were released (compiled code of a model that is detached?)");
        return *entries[handle];
    }

  private:
    std::mutex mutex;
    std::vector<T *> entries;
};

/* never destroyed: calls may come while the process ends */
Table<layer> &linears = *new Table<layer>;
Table<FFN> &ffns = *new Table<FFN>;

/* A tensor's numbers. It does not hold them: while a program is recorded each operator holds what it has made, and whoever
 * records all else; what comes from outside may be given up, and is then not read any more. */
struct Numbers {
    const void *data;
    ScalarType type;
    int64_t n;
    explicit Numbers(const Tensor &x) : data(x.const_data_ptr()), type(x.scalar_type()), n(x.numel()) {
        STD_TORCH_CHECK(x.is_contiguous(), "popmm: give a tensor in one piece");
        const bool known = type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
        STD_TORCH_CHECK(known, "popmm: give float32, bfloat16 or float16");
    }
};

template <typename T> const float *widened(const Numbers &x, std::vector<float> &memory) {
    memory.resize(x.n);
    for (int64_t i = 0; i < x.n; i++) memory[i] = ((const T *)x.data)[i];
    return memory.data();
}

/* numbers as float32, in place where they are */
const float *floats(const Numbers &x, std::vector<float> &memory) {
    if (x.type == ScalarType::Float) return (const float *)x.data;
    return x.type == ScalarType::Half ? widened<torch::headeronly::Half>(x, memory)
                                      : widened<torch::headeronly::BFloat16>(x, memory);
}

/* where float32 results for `to` are to be written; rounded() brings them there */
float *results(const Tensor &to, std::vector<float> &memory) {
    if (to.scalar_type() == ScalarType::Float) return (float *)to.mutable_data_ptr();
    memory.resize(to.numel());
    return memory.data();
}

void rounded(const Tensor &to, const std::vector<float> &memory) {
    const int64_t n = to.numel();
    if (to.scalar_type() == ScalarType::BFloat16) {
        auto *out = (torch::headeronly::BFloat16 *)to.mutable_data_ptr();
        for (int64_t i = 0; i < n; i++) out[i] = memory[i];
    } else if (to.scalar_type() == ScalarType::Half) {
        auto *out = (torch::headeronly::Half *)to.mutable_data_ptr();
        for (int64_t i = 0; i < n; i++) out[i] = memory[i];
    }
}

int threads() { return (int)torch::stable::get_num_threads(); }

/* y, after `write` has written it; noted where a program is recorded, which then holds y */
template <typename F> Tensor written(const Tensor &y, const F &write) {
    write();
    if (recording) recording->push_back(write);
    return y;
}

/* x[..., d] to [..., rows of all these layers, one after the other], in the dtype of x */
Tensor planes_linear_op(const Tensor &x, const std::vector<int64_t> &handles) {
    int64_t all = 0;
    const int64_t dims = x.dim(), d = dims ? x.size(dims - 1) : 0;
    for (int64_t handle : handles) {
        const layer &own = linears.at(handle);
        all += own.n_rows;
        STD_TORCH_CHECK(own.d == d && own.group == linears.at(handles[0]).group, "popmm: a vector has ", d, " numbers, and rows ", own.d);
    }
    std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
    shape.back() = all;
    const Tensor y = torch::stable::new_empty(x, shape);
    return written(y, [x = Numbers(x), y, handles, d] {
        thread_local std::vector<layer> layers;
        thread_local std::vector<float> in, out;
        layers.clear();
        for (int64_t handle : handles) layers.push_back(linears.at(handle));
        const int64_t failed =
            layers_dot(layers.data(), (int64_t)layers.size(), x.n / d, floats(x, in), results(y, out), threads());
        STD_TORCH_CHECK(failed < 0, "popmm: there is no memory for a vector of the model");
        rounded(y, out);
    });
}

/* x[..., d] by a matrix [m, d] and a bias [m], all in bfloat16 */
Tensor few_linear_op(const Tensor &x, const Tensor &weight, const std::optional<Tensor> &bias) {
    const int64_t dims = x.dim(), d = dims ? x.size(dims - 1) : 0;
    bool fits = weight.dim() == 2 && weight.size(1) == d && d > 0 && weight.stride(1) == 1 && weight.stride(0) >= d &&
                x.is_contiguous();
    for (const Tensor *own : {&x, &weight, bias.has_value() ? &*bias : &x})
        fits = fits && own->scalar_type() == ScalarType::BFloat16;
    fits = fits && (!bias.has_value() || (bias->numel() == weight.size(0) && bias->is_contiguous()));
    STD_TORCH_CHECK(fits, "popmm: few_linear takes bfloat16 vectors, and a matrix of rows of as many numbers (", d,
                    "), each in one piece");
    std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
    shape.back() = weight.size(0);
    const Tensor y = torch::stable::new_empty(x, shape);
    std::optional<Numbers> numbers;
    if (bias.has_value()) numbers = Numbers(*bias);
    const auto *const rows = (const uint16_t *)weight.const_data_ptr();
    return written(y, [x = Numbers(x), rows, m = weight.size(0), stride = weight.stride(0), bias = numbers, y, d] {
        thread_local std::vector<float> added, out;
        thread_local std::vector<uint16_t> work;
        work.resize(x.n / d * (d + 31));
        const float *own = bias.has_value() ? floats(*bias, added) : nullptr;
        few_linear(rows, m, stride, d, (const uint16_t *)x.data, x.n / d, own, work.data(), results(y, out), threads());
        rounded(y, out);
    });
}

/* x[n, d] through the FFNs whose rows begin at first[n] (without it: at 0), in the dtype of x, or float32 if wide; with
 * votes[n], float32, all through the one at 0, by rows that they choose together */
Tensor tiers_ffn_op(const Tensor &x, const std::optional<Tensor> &first, const std::optional<Tensor> &votes, bool wide,
                    int64_t handle) {
    const int64_t n = x.size(0), d = ffns.at(handle).d;
    STD_TORCH_CHECK(x.dim() == 2 && x.size(1) == d, "popmm: an FFN of d_model=", d, " was given another shape");
    if (first.has_value()) {
        const bool fits = first->is_contiguous() && first->numel() == n && first->scalar_type() == ScalarType::Long;
        STD_TORCH_CHECK(fits, "popmm: first is not an int64 for each of ", n, " tokens");
    }
    if (votes.has_value()) {
        const bool fits = votes->is_contiguous() && votes->numel() == n && votes->scalar_type() == ScalarType::Float;
        STD_TORCH_CHECK(fits && !first.has_value(), "popmm: votes are no float32 for each of ", n, " tokens of one FFN");
    }
    const Tensor y = torch::stable::new_empty(x, std::vector<int64_t>{n, d}, wide ? ScalarType::Float : x.scalar_type());
    const int64_t *const begins = first.has_value() ? (const int64_t *)first->const_data_ptr() : nullptr;
    const float *const shares = votes.has_value() ? (const float *)votes->const_data_ptr() : nullptr;
    return written(y, [x = Numbers(x), begins, shares, y, handle, n] {
        const FFN &own = ffns.at(handle);
        thread_local std::vector<float> in, out;
        thread_local std::vector<int64_t> index, zeros;
        zeros.assign(n, 0);
        index.resize(n * own.read);
        const int64_t failed =
            tiers_ffn(own.parts[0], own.gated ? own.parts[1] : nullptr, own.parts[2], own.n_rows, own.d, own.group, own.d_ff,
                      own.rms, own.norm, own.gate_bias, own.up_bias, own.activation, (int64_t)own.bits.size(), own.bits.data(),
                      own.count.data(), begins ? begins : zeros.data(), shares, n, floats(x, in), results(y, out), index.data(), threads());
        STD_TORCH_CHECK(failed < 0, failed == INT64_MAX ? "popmm: there is no memory for a vector of the model"
                                                        : "popmm: there is no such expert");
        rounded(y, out);
    });
}

/* q[batch, heads, n, d] over k and v[batch, shared heads, tokens, d], the mask none or [1 or batch, 1 or heads, n, tokens] of
 * bool or of the dtype of q; to [batch, n, heads, d], in that dtype */
Tensor attend_op(const Tensor &q, const Tensor &k, const Tensor &v, const std::optional<Tensor> &mask, double scale) {
    const int64_t batch = q.size(0), heads = q.size(1), n = q.size(2), d = q.size(3), shared = k.size(1), tokens = k.size(2);
    const bool narrow = k.scalar_type() == ScalarType::BFloat16;
    const bool fits = q.dim() == 4 && k.dim() == 4 && v.dim() == 4 && k.size(0) == batch && k.size(3) == d &&
                      v.size(0) == batch && v.size(1) == shared && v.size(2) == tokens && shared > 0 && heads % shared == 0 &&
                      (narrow || k.scalar_type() == ScalarType::Float) && v.scalar_type() == k.scalar_type() &&
                      k.stride(3) == 1 && v.stride(3) == 1;
    STD_TORCH_CHECK(fits, "popmm: these queries, keys and values do not go together");
    if (mask.has_value()) {
        const bool covers = mask->dim() == 4 && mask->size(3) == tokens && mask->size(2) == n &&
                            (mask->size(0) == 1 || mask->size(0) == batch) && (mask->size(1) == 1 || mask->size(1) == heads);
        STD_TORCH_CHECK(covers, "popmm: this mask is not of these keys");
    }
    const Tensor y = torch::stable::new_empty(q, std::vector<int64_t>{batch, n, heads, v.size(3)});
    struct Side {
        const void *data;
        int64_t d, strides[3];
        explicit Side(const Tensor &t) : data(t.const_data_ptr()), d(t.size(3)), strides{t.stride(0), t.stride(1), t.stride(2)} {}
    };
    struct Mask {
        const void *data = nullptr;
        int kind = 0; /* 1: bool, 2: added */
        std::optional<Numbers> numbers;
        int64_t strides[4] = {0, 0, 0, 0};
    } own;
    if (mask.has_value()) {
        for (int i = 0; i < 4; i++) own.strides[i] = mask->size(i) > 1 || i == 3 ? mask->stride(i) : 0;
        own.kind = mask->scalar_type() == ScalarType::Bool ? 1 : 2;
        own.data = mask->const_data_ptr();
        if (own.kind == 2) own.numbers = Numbers(*mask);
    }
    return written(y, [q = Numbers(q), k = Side(k), v = Side(v), mask = own, y, scale, batch, heads, shared, n, tokens, narrow] {
        thread_local std::vector<float> in, out, work, added;
        work.resize(batch * heads * n * tokens);
        const void *const masked = mask.kind == 2 ? floats(*mask.numbers, added) : mask.data;
        attend(floats(q, in), k.data, v.data, narrow, batch, heads, shared, n, tokens, k.d, v.d, k.strides, v.strides, masked,
               mask.kind, mask.strides, (float)scale, work.data(), results(y, out), threads());
        rounded(y, out);
    });
}

} // namespace

extern "C" {

int64_t new_linear(const void *const *planes, int64_t n_rows, int64_t d, int64_t group, int bits, const float *bias) {
    return linears.add(new layer{{planes[0], planes[1], planes[2], planes[3]}, n_rows, d, group, bits, bias});
}
void free_linear(int64_t handle) { linears.remove(handle); }

int64_t new_ffn(const void *const *gate, const void *const *up, const void *const *down, int64_t n_rows, int64_t d,
                int64_t group, int64_t d_ff, const float *rms, const float *norm, const float *gate_bias, const float *up_bias,
                int activation, int64_t n_tiers, const int64_t *bits, const int64_t *count) {
    FFN *own = new FFN{};
    own->gated = up != nullptr;
    for (int i = 0; i < 4; i++) own->parts[0][i] = gate[i], own->parts[1][i] = up ? up[i] : nullptr, own->parts[2][i] = down[i];
    own->n_rows = n_rows, own->d = d, own->group = group, own->d_ff = d_ff;
    own->rms = rms, own->norm = norm, own->gate_bias = gate_bias, own->up_bias = up_bias, own->activation = activation;
    own->bits.assign(bits, bits + n_tiers), own->count.assign(count, count + n_tiers);
    for (int64_t n : own->count) own->read += n;
    return ffns.add(own);
}
void free_ffn(int64_t handle) { ffns.remove(handle); }

void *new_program() { return new Program; }
void free_program(void *program) { delete (Program *)program; }

/* What operators run in this thread is noted in the program from now on; in none, if it is NULL. */
void record(void *program) { recording = (Program *)program; }

/* 0 if there are too many arguments */
int64_t append_call(void *program, const void *function, const uint64_t *words, int64_t n) {
    return append(*(Program *)program, function, words, (size_t)n);
}

/* NULL, or what went wrong, to be read before the next call in this thread */
const char *run_program(const void *program) {
    thread_local std::string message;
    try {
        for (const auto &step : *(const Program *)program) step();
    } catch (const std::exception &error) {
        message = error.what();
        return message.c_str();
    }
    return nullptr;
}
}

STABLE_TORCH_LIBRARY(popmm_native, m) {
    m.def("planes_linear(Tensor x, int[] handles) -> Tensor");
    m.def("few_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
    m.def("attend(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale) -> Tensor");
    m.def("tiers_ffn(Tensor x, Tensor? first, Tensor? votes, bool wide, int handle) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(popmm_native, CPU, m) {
    m.impl("planes_linear", TORCH_BOX(&planes_linear_op));
    m.impl("few_linear", TORCH_BOX(&few_linear_op));
    m.impl("attend", TORCH_BOX(&attend_op));
    m.impl("tiers_ffn", TORCH_BOX(&tiers_ffn_op));
}
