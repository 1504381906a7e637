// Fuzzes the C ABI: any shapes and values, right or wrong; every path must give the bits of the scalar one.
//
// With libFuzzer (make fuzz) the bytes are its own. With -DMPQ_STANDALONE a program without it:
// arguments number of inputs, seed; or files of inputs to repeat.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <random>
#include <vector>

#include "../../../espnet_mpq/kernels/csrc/api.h"

namespace {

constexpr int kPaths = 8, kMaxRows = 420, kMaxCols = 700;

// Numbers from the bytes of an input; zeros behind its end.
class Bytes {
public:
    Bytes(const uint8_t* data, size_t n) : at_(data), end_(data + n) {}
    uint8_t byte() { return at_ < end_ ? *at_++ : 0; }
    int between(int least, int most) {
        const uint32_t number = byte() | byte() << 8;
        return least + int(number % uint32_t(most - least + 1));
    }
    // Long arrays are made from a few bytes: the fuzzer changes their kind, not each of their values.
    std::mt19937 generator() { return std::mt19937(uint32_t(byte() | byte() << 8)); }

private:
    const uint8_t *at_, *end_;
};

#define NEED(condition) \
    if (!(condition)) std::printf("line %d: %s\n", __LINE__, #condition), std::abort()

// Exactly as long as the library may read, so that the sanitizer sees one byte more.
template <class T>
std::unique_ptr<T[]> array(size_t n) {
    return std::unique_ptr<T[]>(new T[n]());
}

float odd_float(std::mt19937& random) {
    static const float some[] = {NAN,     INFINITY, -INFINITY, 0.0f,   -0.0f,     1e-45f,
                                 -1e-40f, 3.4e38f,  -3.4e38f,  1e-38f, 8.3886e6f, 127.5f};
    return some[random() % 12];
}

// kind 0: ordinary; 1: with NaN, infinities, subnormal and huge numbers; 2: any bits
void fill(float* x, size_t n, int kind, std::mt19937& random) {
    for (size_t i = 0; i < n; ++i) {
        const uint32_t bits = uint32_t(random());
        x[i] = float(int32_t(bits)) * 1e-9f;
        if (kind == 1 && bits % 16 == 0) x[i] = odd_float(random);
        if (kind == 2) std::memcpy(x + i, &bits, 4);
    }
}

// The same value, or both not a number.
bool same(const float* a, const float* b, size_t n) {
    for (size_t i = 0; i < n; ++i)
        if (std::memcmp(a + i, b + i, 4) && !(std::isnan(a[i]) && std::isnan(b[i]))) return false;
    return true;
}

mpq::Matrix* make_codes(Bytes& in, int rows, int cols) {
    int bits = 1 << in.between(0, 3);
    auto random = in.generator();
    const int n_levels = bits == 8 ? 256 : 1 << bits, kind = in.between(0, 2);
    int8_t levels[256];
    for (int i = 0; i < n_levels; ++i) levels[i] = int8_t(kind == 0 ? 2 * i - n_levels + 1 : i - n_levels / 2);
    if (bits == 8)
        for (int i = 0; i < 256; ++i) levels[i] = int8_t(i - 128);
    else if (kind == 2) {    // any, rising
        std::vector<int> all(256);
        for (int i = 0; i < 256; ++i) all[i] = i - 128;
        std::shuffle(all.begin(), all.end(), random);
        std::sort(all.begin(), all.begin() + n_levels);
        for (int i = 0; i < n_levels; ++i) levels[i] = int8_t(all[i]);
    }
    const int group_size = in.between(0, 3) ? cols : in.between(1, cols);
    const int n_groups = (cols + group_size - 1) / group_size;
    const int scale_rows = in.between(0, 3) ? rows : 1;
    const size_t row_n_bytes = (size_t(cols) * bits + 7) / 8, n_codes = rows * row_n_bytes;
    auto codes = array<uint8_t>(n_codes);
    for (size_t i = 0; i < n_codes; ++i) codes[i] = uint8_t(random());
    const int used = cols * bits % 8;    // of the last byte of a row; padding bits are 0
    for (int r = 0; used && r < rows; ++r) codes[(r + 1) * row_n_bytes - 1] &= uint8_t((1 << used) - 1);
    auto scales = array<float>(size_t(scale_rows) * n_groups);
    fill(scales.get(), size_t(scale_rows) * n_groups, 0, random);
    const int wrong = in.between(0, 40);
    if (wrong == 1) bits = 3;
    if (wrong == 2) std::swap(levels[0], levels[1]);
    mpq::Matrix* w = mpq_matrix_of_codes(codes.get(), rows, cols, bits, levels, wrong == 3 ? 0 : n_levels,
                                         scales.get(), wrong == 4 ? rows + 1 : scale_rows,
                                         wrong == 5 ? cols + 1 : wrong == 6 ? 0 : group_size);
    NEED((w == nullptr) == (wrong >= 1 && wrong <= 6));
    if (!w) return nullptr;
    auto stored = array<uint8_t>(n_codes);
    NEED(mpq_matrix_stored(w, stored.get()) == mpq::kOk);
    NEED(std::memcmp(stored.get(), codes.get(), n_codes) == 0);
    NEED(mpq_matrix_n_bytes(w) > int64_t(n_codes));
    return w;
}

mpq::Matrix* make_floats(Bytes& in, int rows, int cols) {
    const bool is_half = in.between(0, 1);
    auto random = in.generator();
    const size_t n = size_t(rows) * cols, n_bytes = n * (is_half ? 2 : 4);
    auto values = array<char>(n_bytes);
    for (size_t i = 0; i < n; ++i) {
        const uint16_t half = uint16_t(random() & 0xbfff);    // finite, subnormal ones too
        const float value = float(int32_t(random())) * 1e-9f;
        if (is_half)
            std::memcpy(values.get() + 2 * i, &half, 2);
        else
            std::memcpy(values.get() + 4 * i, &value, 4);
    }
    mpq::Matrix* w = mpq_matrix_of_floats(values.get(), rows, cols, is_half ? 16 : 32);
    NEED(w);
    auto stored = array<char>(n_bytes);
    NEED(mpq_matrix_stored(w, stored.get()) == mpq::kOk && !std::memcmp(stored.get(), values.get(), n_bytes));
    return w;
}

mpq::Matrix* make_matrix(Bytes& in, int rows, int cols) {
    return in.between(0, 3) ? make_codes(in, rows, cols) : make_floats(in, rows, cols);
}

void check_rows(const mpq::Matrix* w, int rows, int cols) {
    const int64_t wanted[] = {0, rows - 1, rows / 2}, wrong[] = {0, rows};
    auto out = array<float>(3 * size_t(cols));
    NEED(mpq_matrix_rows(w, wanted, 3, out.get()) == mpq::kOk);
    NEED(mpq_matrix_rows(w, wrong, 2, out.get()) == mpq::kNoSuchRow);
}

void check_products(Bytes& in) {
    const int rows = in.between(1, in.between(0, 3) ? 90 : kMaxRows);
    const int cols = in.between(1, in.between(0, 3) ? 150 : kMaxCols);
    std::unique_ptr<mpq::Matrix, void (*)(mpq::Matrix*)> w(make_matrix(in, rows, cols), mpq_matrix_free);
    if (!w) return;
    check_rows(w.get(), rows, cols);
    const int batch = in.between(0, in.between(0, 3) ? 20 : 130), kind = in.between(0, 2);
    auto random = in.generator();
    auto x = array<float>(size_t(batch) * cols), bias = array<float>(rows);
    fill(x.get(), size_t(batch) * cols, kind, random);
    fill(bias.get(), rows, kind, random);
    auto q = array<int8_t>(size_t(batch) * cols);
    for (size_t i = 0; i < size_t(batch) * cols; ++i) q[i] = int8_t(random());
    const bool has_bias = in.between(0, 1);
    const size_t n = size_t(batch) * rows;
    auto y = array<float>(n), first = array<float>(n);
    // At most a group for each column.
    auto products = array<int32_t>(n * cols), first_products = array<int32_t>(n * cols);
    auto quantized = array<int8_t>(size_t(batch) * cols), first_quantized = array<int8_t>(size_t(batch) * cols);
    auto scales = array<float>(batch), first_scales = array<float>(batch);
    int made = 0;
    for (int path = 0; path < kPaths; ++path) {
        const int n_threads = in.between(1, 4);
        if (!mpq_has_path(path)) {
            NEED(mpq_linear(w.get(), x.get(), batch, nullptr, y.get(), path, 1) == mpq::kNoPath);
            continue;
        }
        const float* b = has_bias ? bias.get() : nullptr;
        NEED(mpq_linear(w.get(), x.get(), batch, b, y.get(), path, n_threads) == mpq::kOk);
        const int status = mpq_product(w.get(), q.get(), batch, products.get(), path, n_threads);
        NEED(status == mpq::kOk || status == mpq::kBadArgument);
        NEED(mpq_quantize(x.get(), batch, cols, quantized.get(), scales.get(), path) == mpq::kOk);
        if (made++) {
            NEED(same(y.get(), first.get(), n));
            NEED(!std::memcmp(products.get(), first_products.get(), n * cols * 4));
            NEED(!std::memcmp(quantized.get(), first_quantized.get(), size_t(batch) * cols));
            NEED(same(scales.get(), first_scales.get(), batch));
        } else {
            std::swap(y, first), std::swap(products, first_products);
            std::swap(quantized, first_quantized), std::swap(scales, first_scales);
        }
    }
    NEED(mpq_linear(w.get(), x.get(), -1, nullptr, y.get(), 0, 1) == mpq::kBadArgument);
    NEED(mpq_linear(w.get(), x.get(), batch, nullptr, y.get(), 0, 0) == mpq::kBadArgument);
}

void check_lstm(Bytes& in) {
    const int n_layers = in.between(1, 3), unit = in.between(1, 80), nhid = in.between(1, 80);
    const int vocab_size = in.between(1, 150), n_matrices = 8 * n_layers + 2;
    std::vector<mpq::Matrix*> w;
    for (int k = 0; k < n_matrices; ++k) {
        const bool is_ends = k == 0 || k == n_matrices - 1, is_input = k >= 1 && k <= 4;
        w.push_back(make_matrix(in, is_ends ? vocab_size : nhid, k == 0 || is_input ? unit : nhid));
    }
    const bool all = std::all_of(w.begin(), w.end(), [](mpq::Matrix* one) { return one; });
    auto random = in.generator();
    std::vector<std::unique_ptr<float[]>> own;
    std::vector<const float*> biases;
    for (int k = 0; k <= 4 * n_layers; ++k) {
        const size_t n = k == 4 * n_layers ? vocab_size : nhid;
        own.push_back(array<float>(n));
        fill(own.back().get(), n, 0, random);
        biases.push_back(own.back().get());
    }
    const int off = in.between(0, 20) == 0;    // another width than the matrices have
    mpq::LstmLm* lm = mpq_lstm_lm_new(n_layers, unit, nhid + off, vocab_size, w.data(), biases.data());
    NEED((lm != nullptr) == (all && !off));
    if (lm) {
        const int batch = in.between(0, in.between(0, 7) ? 7 : 130), length = in.between(1, 3);
        const size_t n_state = size_t(n_layers) * batch * nhid, n_out = size_t(batch) * length * vocab_size;
        auto tokens = array<int64_t>(size_t(batch) * length);
        for (int i = 0; i < batch * length; ++i) tokens[i] = random() % vocab_size;
        auto h = array<float>(n_state), c = array<float>(n_state);
        const int kind = in.between(0, 2);
        fill(h.get(), n_state, kind, random), fill(c.get(), n_state, kind, random);
        const bool has_state = in.between(0, 1), log_probs = in.between(0, 1);
        std::unique_ptr<float[]> first[3];
        for (int path = 0; path < kPaths; ++path) {
            const int n_threads = in.between(1, 4);
            if (!mpq_has_path(path)) continue;
            std::unique_ptr<float[]> got[] = {array<float>(n_state), array<float>(n_state), array<float>(n_out)};
            NEED(mpq_lstm_lm_run(lm, tokens.get(), batch, length, has_state ? h.get() : nullptr,
                                 has_state ? c.get() : nullptr, got[0].get(), got[1].get(), got[2].get(),
                                 log_probs, path, n_threads) == mpq::kOk);
            for (int k = 0; k < 3; ++k) {
                if (first[k]) NEED(same(got[k].get(), first[k].get(), k == 2 ? n_out : n_state));
                if (!first[k]) first[k] = std::move(got[k]);
            }
        }
        if (batch) {
            tokens[batch * length - 1] = vocab_size;
            NEED(mpq_lstm_lm_run(lm, tokens.get(), batch, length, nullptr, nullptr, h.get(), c.get(), nullptr, 0,
                                 0, 1) == mpq::kNoSuchRow);
        }
    }
    mpq_lstm_lm_free(lm);
    for (mpq::Matrix* one : w) mpq_matrix_free(one);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t n) {
    Bytes in(data, n);
    in.between(0, 2) ? check_products(in) : check_lstm(in);
    return 0;
}

#ifdef MPQ_STANDALONE
int main(int n_arguments, char** arguments) {
    const int n = n_arguments > 1 ? std::atoi(arguments[1]) : 100;
    for (int i = 1; n == 0 && i < n_arguments; ++i) {
        std::ifstream file(arguments[i], std::ios::binary);
        const std::vector<char> data((std::istreambuf_iterator<char>(file)), {});
        LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(data.data()), data.size());
    }
    std::mt19937 random(n_arguments > 2 ? std::atoi(arguments[2]) : 1);
    uint8_t data[256];
    for (int i = 0; i < n; ++i) {
        for (uint8_t& byte : data) byte = uint8_t(random());
        LLVMFuzzerTestOneInput(data, sizeof data);
    }
    std::printf("%d inputs\n", n);
    return 0;
}
#endif
