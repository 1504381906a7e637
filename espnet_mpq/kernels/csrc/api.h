// The C ABI of the library. Nothing throws; a null pointer or a negative number is a failure:
// -1 bad argument, -2 this machine has not got the path, -3 no memory, -4 a token outside the vocabulary.
#pragma once
#include <cstdint>

#define MPQ_API extern "C" __attribute__((visibility("default")))

namespace mpq {
struct Matrix;
struct Lstm;
}  // namespace mpq

MPQ_API int mpq_abi_version();
// 0 scalar, 1 avx2, 2 avx512
MPQ_API int mpq_has_path(int path);

// codes (rows, ceil(cols * bits / 8)) as in packed/FORMAT.md; at 8 bits levels are consecutive;
// n_scales is 1 or rows.
MPQ_API mpq::Matrix* mpq_matrix_new(const uint8_t* codes, int64_t rows, int64_t cols, int bits,
                                    const int8_t* levels, int n_levels, const float* scales,
                                    int64_t n_scales);
MPQ_API void mpq_matrix_free(mpq::Matrix* m);
MPQ_API int64_t mpq_matrix_n_bytes(const mpq::Matrix* m);

// y (batch, rows) int32 = level[code] x for x int8 (batch, cols), exact
MPQ_API int mpq_product(const mpq::Matrix* m, const int8_t* x, int64_t batch, int32_t* y, int path);
// q (batch, cols) int8 and scales (batch,) of x float (batch, cols)
MPQ_API int mpq_quantize(const float* x, int64_t batch, int64_t cols, int8_t* q, float* scales,
                         int path);
// y (batch, rows) float = x W^T + bias with x quantized per row; bias (rows,) or null
MPQ_API int mpq_linear(const mpq::Matrix* m, const float* x, int64_t batch, const float* bias,
                       float* y, int path);

// matrices: per layer the input products of gates i, f, g, o, then the hidden ones; last the output.
// biases: per layer those of i, f, g, o (both of the host's added), last the output's.
// The embedding's codes stay where they are. All matrices and codes must outlive the LSTM.
MPQ_API mpq::Lstm* mpq_lstm_new(int n_layers, int64_t unit, int64_t nhid, int64_t vocab_size,
                                const mpq::Matrix* const* matrices, const float* const* biases,
                                const uint8_t* codes, int bits, const int8_t* levels, int n_levels,
                                const float* scales, int64_t n_scales);
MPQ_API void mpq_lstm_free(mpq::Lstm* lstm);
// tokens (batch, length); h, c (n_layers, batch, nhid), read from *_in (null: zeros), written to *_out;
// out (batch, length, vocab_size): logits, or log-probabilities when log_probs is not 0
MPQ_API int mpq_lstm_run(const mpq::Lstm* lstm, const int64_t* tokens, int64_t batch, int64_t length,
                         const float* h_in, const float* c_in, float* h_out, float* c_out, float* out,
                         int log_probs, int path);
