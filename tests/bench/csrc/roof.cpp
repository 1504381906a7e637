// What this machine can do at most: 8-bit multiply-adds and bytes read a second, on n threads.
//
// Multiply-adds: each path's own instructions on independent accumulators that stay in registers.
// Reads: the widest loads of the machine over a buffer of a given size, again and again.
#include <stdint.h>
#include <stdlib.h>
#ifdef __linux__
#include <sys/mman.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;
// The compiler may not know what a register holds: nothing is folded, moved out of loops, or spilled.
#if defined(__x86_64__)
#define OPAQUE(v) asm volatile("" : "+v"(v))
#endif

// Accumulators by name: gcc keeps an array of them in memory.
#define EIGHT(do) do(0) do(1) do(2) do(3) do(4) do(5) do(6) do(7)
#define TWELVE(do) EIGHT(do) do(8) do(9) do(10) do(11)
constexpr int kTurns = 4096;

// Runs work(thread) -> units of work on n threads until `seconds` are over; units a second of all.
template <class Work>
double rate(int n_threads, double seconds, const Work& work) {
    std::atomic<int> waiting{n_threads};
    std::vector<double> rates(n_threads);
    auto body = [&](int thread) {
        work(thread);    // first touch, clock frequency
        waiting--;
        while (waiting > 0) std::this_thread::yield();
        const auto start = Clock::now();
        double units = 0.0, passed = 0.0;
        while (passed < seconds) {
            units += work(thread);
            passed = std::chrono::duration<double>(Clock::now() - start).count();
        }
        rates[thread] = units / passed;
    };
    std::vector<std::thread> others;
    for (int i = 1; i < n_threads; ++i) others.emplace_back(body, i);
    body(0);
    for (auto& other : others) other.join();
    double sum = 0.0;
    for (double r : rates) sum += r;
    return sum;
}

#if defined(__x86_64__)
__attribute__((target("avx512f,avx512vnni"))) double macs_avx512() {
    const __m512i u = _mm512_set1_epi8(3), x = _mm512_set1_epi8(1);
#define NEW(i) __m512i a##i = _mm512_setzero_si512();
#define STEP(i)                             \
    a##i = _mm512_dpbusd_epi32(a##i, u, x); \
    OPAQUE(a##i);
    TWELVE(NEW)
    for (int t = 0; t < kTurns; ++t) {
        TWELVE(STEP)
    }
    return 64.0 * 12 * kTurns;
#undef NEW
#undef STEP
}

// Pairs of products in 16 bits, pairs of those in 32: what is exact without VNNI.
__attribute__((target("avx2"))) double macs_avx2() {
    const __m256i u = _mm256_set1_epi8(3), ones = _mm256_set1_epi16(1);
    __m256i x = _mm256_set1_epi8(1);
#define NEW(i) __m256i a##i = _mm256_setzero_si256();
#define STEP(i)                                                                               \
    OPAQUE(x);                                                                                \
    a##i = _mm256_add_epi32(a##i, _mm256_madd_epi16(_mm256_maddubs_epi16(u, x), ones)); \
    OPAQUE(a##i);
    TWELVE(NEW)
    for (int t = 0; t < kTurns; ++t) {
        TWELVE(STEP)
    }
    return 32.0 * 12 * kTurns;
#undef NEW
#undef STEP
}

__attribute__((target("avx512f"))) void read_avx512(const char* p, size_t n) {
#define NEW(i) __m512i a##i = _mm512_setzero_si512();
#define STEP(i)                                                       \
    a##i = _mm512_xor_si512(a##i, _mm512_load_si512(p + k + 64 * i)); \
    OPAQUE(a##i);
    EIGHT(NEW)
    for (size_t k = 0; k < n; k += 512) {
        EIGHT(STEP)
    }
#undef NEW
#undef STEP
}

__attribute__((target("avx2"))) void read_avx2(const char* p, size_t n) {
#define NEW(i) __m256i a##i = _mm256_setzero_si256();
#define STEP(i)                                                                                 \
    a##i = _mm256_xor_si256(                                                                    \
        a##i, _mm256_load_si256(reinterpret_cast<const __m256i*>(p + k + 32 * i))); \
    OPAQUE(a##i);
    EIGHT(NEW)
    for (size_t k = 0; k < n; k += 256) {
        EIGHT(STEP)
    }
#undef NEW
#undef STEP
}
#elif defined(__aarch64__)
double macs_neon() {
    int32x4_t u = vdupq_n_s32(3), x = vdupq_n_s32(1);
#define NEW(i) int32x4_t a##i = vdupq_n_s32(0);
#define STEP(i) asm volatile("sdot %0.4s, %1.16b, %2.16b" : "+w"(a##i) : "w"(u), "w"(x));
    TWELVE(NEW)
    for (int t = 0; t < kTurns; ++t) {
        TWELVE(STEP)
    }
    return 16.0 * 12 * kTurns;
#undef NEW
#undef STEP
}
#endif

void read_plain(const char* p, size_t n) {
    uint64_t acc[8] = {};
    for (size_t k = 0; k < n; k += 64)
        for (int i = 0; i < 8; ++i) acc[i] ^= reinterpret_cast<const uint64_t*>(p + k)[i];
    for (uint64_t a : acc) asm volatile("" : : "r"(a));
}

}  // namespace

// Multiply-adds a second; path as in the kernels' numbering (1 avx2, 2 avx512, 4 neon), 0 for others.
extern "C" double roof_macs(int path, int n_threads, double seconds) {
    double (*work)() = nullptr;
#if defined(__x86_64__)
    if (path == 1) work = macs_avx2;
    if (path == 2) work = macs_avx512;
#elif defined(__aarch64__)
    if (path == 4) work = macs_neon;
#endif
    return work ? rate(n_threads, seconds, [&](int) { return work(); }) : 0.0;
}

// Bytes a second over n_bytes that the threads share equally; 0 when there is no memory.
extern "C" double roof_read(int64_t n_bytes, int n_threads, double seconds) {
    void (*read)(const char*, size_t) = read_plain;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2")) read = read_avx2;
    if (__builtin_cpu_supports("avx512f")) read = read_avx512;
#endif
    const size_t each = size_t((n_bytes - 1) / n_threads / 512 + 1) * 512;
    const size_t page = size_t(2) << 20, all = each * n_threads;
    const size_t rounded = (all + page - 1) / page * page;
    char* buffer = static_cast<char*>(aligned_alloc(page, rounded));
    if (!buffer) return 0.0;
#ifdef MADV_HUGEPAGE
    madvise(buffer, rounded, MADV_HUGEPAGE);
#endif
    for (size_t k = 0; k < all; ++k) buffer[k] = char(k);
    // At least a megabyte between two looks at the clock.
    const size_t turns = 1 + (size_t(1) << 20) / each;
    const double found = rate(n_threads, seconds, [&](int thread) {
        for (size_t t = 0; t < turns; ++t) read(buffer + each * thread, each);
        return double(each * turns);
    });
    free(buffer);
    return found;
}
