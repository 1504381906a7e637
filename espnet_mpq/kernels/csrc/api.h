// The C ABI of the library. Nothing throws; a null pointer or a negative number (Status) is a failure.
// Results are the same bits for every path and n_threads (>= 1, the caller's thread among them).
#pragma once
#include <cstdint>

#define MPQ_API extern "C" __attribute__((visibility("default")))

namespace mpq {
struct Matrix;
struct LstmLm;

// What calls return. The words for people are FAILURES of dispatch.py; a test holds both together.
enum Status : int {
    kOk = 0,
    kBadArgument = -1,
    kNoPath = -2,       // this machine has not got it
    kNoMemory = -3,
    kNoSuchRow = -4,    // a token outside the vocabulary
};

// Numbers of the paths; PATHS of dispatch.py.
enum PathNumber : int { kPathScalar = 0, kPathAvx2, kPathAvx512, kPathAvx512Vbmi, kPathNeon };
}  // namespace mpq

// Rises with every change of this file that an old caller would not survive: ABI_VERSION of dispatch.py.
MPQ_API int mpq_abi_version();
MPQ_API int mpq_has_path(int path);
// Columns of the widest matrix.
MPQ_API int64_t mpq_max_cols();
// Threads of the library that exist, asleep or at work; never more than the last n_threads - 1.
MPQ_API int mpq_n_workers();
// Gives memory that was freed back to the system, where the C library can.
MPQ_API void mpq_trim();

// codes (rows, ceil(cols * bits / 8)) as in packed/FORMAT.md; levels ascend, at 8 bits one by one.
// scales (scale_rows, ceil(cols / group_size)); scale_rows is 1 or rows, group_size 1 to cols.
MPQ_API mpq::Matrix* mpq_matrix_of_codes(const uint8_t* codes, int64_t rows, int64_t cols, int bits,
                                         const int8_t* levels, int n_levels, const float* scales,
                                         int64_t scale_rows, int64_t group_size);
// values (rows, cols): IEEE halves (bits 16) or floats (bits 32), finite
MPQ_API mpq::Matrix* mpq_matrix_of_floats(const void* values, int64_t rows, int64_t cols, int bits);
MPQ_API void mpq_matrix_free(mpq::Matrix* w);
MPQ_API int64_t mpq_matrix_n_bytes(const mpq::Matrix* w);
// The codes, halves or floats as they came in, bit for bit.
MPQ_API int mpq_matrix_stored(const mpq::Matrix* w, void* stored);
// out (n, cols) float = rows of the matrix
MPQ_API int mpq_matrix_rows(const mpq::Matrix* w, const int64_t* rows, int64_t n, float* out);

// y (n_groups, batch, rows) int32 = level[code] x over the columns of each group, for x int8
// (batch, cols); exact. Not for floats.
MPQ_API int mpq_product(const mpq::Matrix* w, const int8_t* x, int64_t batch, int32_t* y, int path,
                        int n_threads);
// q (batch, cols) int8 and scales (batch,) of x float (batch, cols)
MPQ_API int mpq_quantize(const float* x, int64_t batch, int64_t cols, int8_t* q, float* scales,
                         int path);
// y (batch, rows) float = x W^T + bias; x is quantized per row unless W is floats; bias (rows,) or null
MPQ_API int mpq_linear(const mpq::Matrix* w, const float* x, int64_t batch, const float* bias,
                       float* y, int path, int n_threads);

// matrices: the embedding; per layer the input products of gates i, f, g, o, then the hidden ones; last
// the output, which may be the embedding. They must outlive the LM.
// biases: per layer those of i, f, g, o (both of the host's added), last the output's.
MPQ_API mpq::LstmLm* mpq_lstm_lm_new(int n_layers, int64_t unit, int64_t nhid, int64_t vocab_size,
                                     const mpq::Matrix* const* matrices, const float* const* biases);
MPQ_API void mpq_lstm_lm_free(mpq::LstmLm* lm);
// tokens (batch, length); h, c (n_layers, batch, nhid), read from *_in (null: zeros), written to *_out;
// out (batch, length, vocab_size): logits, or log-probabilities when log_probs is not 0
MPQ_API int mpq_lstm_lm_run(const mpq::LstmLm* lm, const int64_t* tokens, int64_t batch, int64_t length,
                            const float* h_in, const float* c_in, float* h_out, float* c_out, float* out,
                            int log_probs, int path, int n_threads);
