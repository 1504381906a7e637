// Program for the thread sanitizer: several threads call products with workers, with changing settings.
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

#include "../../../espnet_mpq/kernels/csrc/api.h"

int main() {
    constexpr int kRows = 700, kCols = 800, kBatch = 12;
    uint32_t seed = 1;
    auto next = [&seed] { return seed = seed * 1664525u + 1013904223u; };
    std::vector<uint8_t> codes(kRows * kCols / 4);
    for (auto& code : codes) code = uint8_t(next() >> 24);
    std::vector<float> scales(kRows), x(kBatch * kCols), want(kBatch * kRows);
    for (auto& scale : scales) scale = float(next() >> 24) / 256;
    for (auto& value : x) value = float(int32_t(next())) / 2147483648.0f;
    const int8_t levels[] = {-3, -1, 1, 3};
    mpq::Matrix* w =
        mpq_matrix_of_codes(codes.data(), kRows, kCols, 2, levels, 4, scales.data(), kRows, kCols);
    if (!w || mpq_linear(w, x.data(), kBatch, nullptr, want.data(), 0, 1)) return 2;
    int n_wrong[3] = {};
    std::vector<std::thread> callers;
    for (int t = 0; t < 3; ++t)
        callers.emplace_back([&, t] {
            std::vector<float> y(want.size());
            for (int i = 0; i < 60; ++i) {
                const int n_threads = 1 + (i / 10 + t) % 4;
                const int failed = mpq_linear(w, x.data(), kBatch, nullptr, y.data(), 0, n_threads);
                n_wrong[t] += failed || std::memcmp(y.data(), want.data(), y.size() * 4) != 0;
                // Now and then long enough for the workers to fall asleep.
                if (i % 7 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
            }
        });
    for (auto& caller : callers) caller.join();
    mpq_matrix_free(w);
    std::printf("%d wrong, %d workers\n", n_wrong[0] + n_wrong[1] + n_wrong[2], mpq_n_workers());
    return n_wrong[0] + n_wrong[1] + n_wrong[2] ? 1 : 0;
}
