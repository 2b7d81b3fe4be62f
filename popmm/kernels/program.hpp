/* What a compiled decode step calls, one after the other, over tensors that stay where they are: to be run again without
 * Python. Operators note themselves while a program is recorded; kernels that the compiler has generated are added. */
#ifndef POPMM_PROGRAM_HPP
#define POPMM_PROGRAM_HPP
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

using Program = std::vector<std::function<void()>>;

inline thread_local Program *recording = nullptr;

using Word = uint64_t; /* an address or an int64: both are passed in a general register, or in 8 bytes of the stack */

template <size_t... I> void call_with(const void *function, const Word *words, std::index_sequence<I...>) {
    ((void (*)(decltype((void)I, Word{})...))function)(words[I]...);
}

template <size_t N> void call(const void *function, const Word *words) {
    call_with(function, words, std::make_index_sequence<N>{});
}

constexpr size_t MOST_WORDS = 1024;

/* Appends a call of a C function of addresses and int64, which returns nothing; false if there are too many.
 *
 * It is called with zeros after its own arguments: where the caller takes arguments off the stack (x86-64 but Windows,
 * AArch64) a function does not see them. */
inline bool append(Program &program, const void *function, const Word *words, size_t n) {
    static const std::pair<size_t, void (*)(const void *, const Word *)> calls[] = {
        {8, call<8>}, {16, call<16>}, {32, call<32>}, {64, call<64>}, {128, call<128>}, {256, call<256>}, {512, call<512>}, {MOST_WORDS, call<MOST_WORDS>}};
    for (auto [most, made] : calls)
        if (n <= most) {
            std::vector<Word> padded(words, words + n);
            padded.resize(most);
            program.push_back([made, function, padded = std::move(padded)] { made(function, padded.data()); });
            return true;
        }
    return false;
}
#endif
