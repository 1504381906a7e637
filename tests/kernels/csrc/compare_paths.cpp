// Compares every path of a kernel library with plain loops, without Python: for machines that are only
// emulated. Arguments: number of random shapes. Says which paths ran; exit status 1 at a difference.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <set>
#include <vector>

#include "../../../espnet_mpq/kernels/csrc/api.h"

namespace {

std::mt19937 generator(1);

int between(int least, int most) { return std::uniform_int_distribution<int>(least, most)(generator); }

std::vector<int8_t> random_levels(int bits) {
    std::vector<int8_t> levels;
    const int most = bits == 8 ? 256 : between(2, 1 << bits);
    if (bits == 8 || between(0, 1)) {    // equidistant
        const int step = bits == 8 ? 1 : between(1, 255 / most);
        const int first = bits == 8 ? -128 : between(-128, 127 - step * (most - 1));
        for (int i = 0; i < most; ++i) levels.push_back(int8_t(first + step * i));
    } else {
        std::set<int8_t> some;
        while (int(some.size()) < most) some.insert(int8_t(between(-128, 127)));
        levels.assign(some.begin(), some.end());
    }
    return levels;
}

// False, and a line of text, at a difference.
bool compare(int n_paths) {
    const int widths[] = {1, 3, 7, 64, 650, 1031};
    const int bits = 1 << between(0, 3), batch = between(1, 61);
    const int rows = between(0, 3) ? between(1, 150) : 400;    // of 1 bit, many rows have tables
    const int cols = between(0, 1) ? widths[between(0, 5)] : between(1, 200);
    const std::vector<int8_t> levels = random_levels(bits);
    const int row_n_bytes = (cols * bits + 7) / 8, mask = (1 << bits) - 1;
    std::vector<uint8_t> codes(rows * row_n_bytes);
    std::vector<int> weights(rows * cols);
    const bool is_extreme = between(0, 3) == 0;
    for (int i = 0; i < rows * cols; ++i) {
        const int last = int(levels.size()) - 1, col = i % cols;
        const int code = is_extreme ? between(0, 1) * last : between(0, last);
        codes[i / cols * row_n_bytes + col * bits / 8] |= uint8_t((code & mask) << (col * bits % 8));
        weights[i] = levels[code];
    }
    std::vector<int8_t> x(batch * cols);
    for (int8_t& one : x) one = int8_t(is_extreme ? between(0, 1) * 255 - 128 : between(-128, 127));
    std::vector<float> scales(rows), floats(batch * cols), bias(rows);
    for (float& one : scales) one = float(between(1, 1000)) / 1000;
    for (float& one : floats) one = float(between(-1000, 1000)) / 77;
    for (float& one : bias) one = float(between(-1000, 1000)) / 99;
    mpq::Matrix* w = mpq_matrix_of_codes(codes.data(), rows, cols, bits, levels.data(), int(levels.size()),
                                    scales.data(), rows, cols);
    if (!w) return std::printf("refused: %d x %d, %d bits\n", rows, cols, bits), false;
    std::vector<int32_t> want(batch * rows);
    for (int b = 0; b < batch; ++b)
        for (int r = 0; r < rows; ++r)
            for (int k = 0; k < cols; ++k) want[b * rows + r] += weights[r * cols + k] * x[b * cols + k];
    bool good = true;
    std::vector<float> first(batch * rows), linear(batch * rows);
    for (int path = 0; path < n_paths && good; ++path) {
        if (!mpq_has_path(path)) continue;
        std::vector<int32_t> y(batch * rows);
        good = mpq_product(w, x.data(), batch, y.data(), path, 1) == 0 && y == want;
        if (!good) std::printf("path %d: product of %d x %d by %d, %d bits\n", path, rows, cols, batch, bits);
        std::vector<float>& to = path ? linear : first;
        if (mpq_linear(w, floats.data(), batch, bias.data(), to.data(), path, 1) ||
            std::memcmp(to.data(), first.data(), to.size() * 4)) {
            std::printf("path %d: linear of %d x %d by %d, %d bits\n", path, rows, cols, batch, bits);
            good = false;
        }
    }
    mpq_matrix_free(w);
    return good;
}

}  // namespace

int main(int n_arguments, char** arguments) {
    const int n_paths = 8, n = n_arguments > 1 ? std::atoi(arguments[1]) : 100;
    for (int i = 0; i < n; ++i)
        if (!compare(n_paths)) return 1;
    std::printf("%d shapes, paths", n);
    for (int path = 0; path < n_paths; ++path)
        if (mpq_has_path(path)) std::printf(" %d", path);
    std::printf("\n");
    return 0;
}
