// Loops that are unrolled while they are compiled, for the vector paths.
#include <utility>

namespace {

// Calls f(0), f(1), ... f(N - 1) with constants: arrays indexed by them stay in registers, which gcc
// does not do for arrays that any loop touches.
template <class F, int... I>
inline __attribute__((always_inline)) void each(const F& f, std::integer_sequence<int, I...>) {
    (f(std::integral_constant<int, I>()), ...);
}
#define MPQ_EACH(n, i, ...) \
    each([&](auto i) __attribute__((always_inline)) { __VA_ARGS__; }, std::make_integer_sequence<int, n>())

}  // namespace
