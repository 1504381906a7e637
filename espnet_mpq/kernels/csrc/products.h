// What the portable translation units share: rows of matrices, activations, products of both.
//
// Not for the units of one instruction set: what stands inline here must be portable code.
#pragma once
#include "kernels.h"

namespace mpq {

// codes (cols,) uint8 of a row of one group of columns
void codes_of_row(const ColumnGroup& group, int64_t row, uint8_t* codes);
inline int level_of(const ColumnGroup& group, int code) {
    return group.min_level + (group.bits == 8 ? code : group.u_of_code[code]);
}
// out (cols,) float = a row of the matrix
void float_row(const Matrix& w, int64_t row, float* out);

// Activations in every form that the matrices they meet ask for; what points nowhere is not needed.
struct Input {
    struct Form {
        int64_t group_size;
        int8_t* x;          // one interleaved array for each group of columns
        int32_t* sums;      // (n_groups, batch)
        uint8_t* tables;    // kTablesPerByte bytes for each of x, for 1-bit matrices, or null
    };
    int batch;
    int64_t cols;
    const float* rows;    // (batch, cols)
    int8_t* q;            // (batch, cols)
    float* scales;        // (batch,)
    static constexpr int kMaxForms = 4;    // the gates of an LSTM may each have another group size
    int n_room, n_forms;                   // forms that there is memory for, and that are made
    Form forms[kMaxForms];

    static size_t form_n_bytes(const Matrix& w, int batch);
    static size_t n_bytes(int64_t cols, int batch, size_t form_n_bytes, int n_forms);
    // From the memory of an arena that has n_bytes left; n_forms is at most kMaxForms.
    void allocate(Arena& arena, int64_t cols, int batch, size_t form_n_bytes, int n_forms);
    void quantize(const Path& path);
    // Forms of q for n matrices, no more than allocate was told.
    void arrange(const Path& path, const Matrix* const* w, int n);
};

// Scratch for `multiply` of n_blocks rows.
inline size_t product_n_bytes(int batch, int n_blocks) { return size_t(batch) * n_blocks * kBlockRows * 4; }

// out (batch, n) at `stride` = (sum + the blocks from `block` on of w times x) + bias. Groups are added one after
// the other. sum (batch, n_blocks * kBlockRows), which it may overwrite, and bias may be null, y and partial are
// scratch of product_n_bytes; partial is only for groups and may be sum or out.
void multiply(const Path& path, const Matrix& w, const Input& x, int block, int n_blocks, void* y,
              float* partial, const float* sum, const float* bias, int n, float* out, int64_t stride);

}  // namespace mpq
