// What the translation units of the kernel library share: matrices, the table of a path, sizes.
//
// NAMES, from the whole to its parts. y = x W^T: x (batch, cols) are activations, w a Matrix of codes or
// floats, y (batch, rows) or, on the way, rows padded to whole blocks.
//   column group  columns with scales of their own, all of a matrix unless its scales are of groups; index g
//   block         kBlockRows rows
//   quad          kQuadCols columns: what one instruction multiplies and sums into an int32
//   pack          kPackBytes bytes, codes of one block: 8 / bits quads, quad number q at bits q * bits of every
//                 byte; a row has kQuadCols bytes of it. Packs of a block follow each other, then the next block
//   u             level - min_level, 0 .. 255: the operand of the products
//   unit          the rows of one vector of a path; a tile is UNITS units by NB rows of x (tiles.inl)
//   chunk         the blocks that one thread multiplies before it makes floats of the sums
//   form          activations as the matrices of one group size take them (products.h)
//   slot          number of a thread inside one call (threads.h)
//
// Only plain data and declarations stand here: an inline function that is compiled for AVX-512 in one
// unit and merged by the linker into another would crash on older CPUs.
#pragma once
#include <cstddef>
#include <cstdint>

namespace mpq {

constexpr int kBlockRows = 16;    // the int32 lanes of one 512-bit register
constexpr int kQuadCols = 4;      // the bytes of an int32 lane
constexpr int kPackBytes = kBlockRows * kQuadCols;
constexpr int kPadCols = 8 * kQuadCols;    // activations are padded to this: a pack of 1 bit, the widest
constexpr int kMaxCols = 65536;            // 128 * 128 * cols stays inside int32
constexpr int kAlignment = 64;             // bytes: a cache line, and the widest vector
// Larger batches are cut, so that scratch stays near the caches: with 650 columns the activations of a layer
// take 0.3 MiB (1.6 MiB with tables for 1 bit) and the gates of a thread 0.3 MiB. A multiple of 4 and 8, the
// widest tiles, so that only the last piece has narrow ones.
constexpr int kMaxBatch = 120;
constexpr int kNibbles = 16;    // entries of a table that a byte shuffle looks up
// Of one quad: kNibbles sums of 4 activations, 2 bytes each, for 4 bytes of x.
constexpr int kTablesPerByte = kNibbles * 2 / kQuadCols;
// Blocks of a chunk, of 8 rows of x or more and of one: up to 8 rows their sums are 4 KiB, which the first-level
// cache holds beside the codes.
constexpr int kChunkBlocks = 8;
constexpr int kMostChunkBlocks = 64;

// Codes of the columns that share scales, in the kernels' layout.
struct ColumnGroup {
    int64_t rows, cols;
    int bits;
    int n_blocks;        // ceil(rows / kBlockRows)
    int n_packs;         // per block
    int min_level;
    int max_u;
    int step;            // between two levels: u = step * code; 0 where it is not always the same
    uint8_t u_of_code[kNibbles];      // bits < 8; at 8 bits u is the code
    uint8_t tables[4][kNibbles];      // nibble -> u of its first, second, ... code
    uint8_t* packs;                   // aligned, n_blocks * n_packs * kPackBytes
    float* scales;                    // n_blocks * kBlockRows, one per row
};

// A whole matrix: codes, one ColumnGroup or several, or floats.
struct Matrix {
    int64_t rows, cols;
    int bits;              // 1, 2, 4, 8: codes; 16, 32: halves or floats
    int n_blocks;
    int64_t group_size;    // columns of a group; the last one may be shorter
    int n_groups;          // 0 for floats
    ColumnGroup* groups;
    void* floats;          // [block][column][kBlockRows], aligned
};

// One instruction set. Activations are int8 [padded_cols / kQuadCols][batch][kQuadCols], sums int32 (batch,).
struct Path {
    const char* name;
    // y (batch, n_blocks * kBlockRows) int32 = levels of the blocks first_block ... times x
    void (*product)(const ColumnGroup& group, const int8_t* x, const int32_t* sums, int batch,
                    int first_block, int n_blocks, int32_t* y);
    // q (cols,) int8 and the scale
    float (*quantize)(const float* x, int64_t cols, int8_t* q);
    // out = (sum + y * (x_scale * scales)) + bias; sum and bias may be null; sum may be out. All but out
    // are readable to the end of the block.
    void (*dequantize)(const int32_t* y, float x_scale, const float* scales, const float* sum,
                       const float* bias, int n, float* out);
    // y (batch, n_blocks * kBlockRows) float = the blocks first_block ... times x (batch, cols), for floats
    void (*float_product)(const Matrix& w, const float* x, int batch, int first_block, int n_blocks,
                          float* y);
    // out = (sum + y) + bias, as dequantize
    void (*add)(const float* y, const float* sum, const float* bias, int n, float* out);
    // LSTM cell of n units from the sums of gates i, f, g, o before their biases
    void (*cell)(const float* const* gates, const float* const* bias, int n, const float* c_in,
                 float* c_out, float* h_out);
    void (*log_softmax)(float* x, int64_t n);
    // Null, or products of 1-bit matrices from tables instead of x: kTablesPerByte bytes for each of x.
    void (*tabulate)(const int8_t* x, int n_packs, int batch, uint8_t* tables);
    void (*product_of_tables)(const ColumnGroup& group, const uint8_t* tables, const int32_t* sums,
                              int batch, int first_block, int n_blocks, int32_t* y);
};

extern const Path kScalar;
#ifdef MPQ_X86
extern const Path kAvx2;
extern const Path kAvx512;
Path avx512_with_tables();
#endif
#ifdef MPQ_ARM64
extern const Path kNeon;
extern const Path kNeonDot;
#endif

// The path of a number (PathNumber of api.h), null where this machine has not got it.
const Path* find_path(int path);

int padded_cols(int64_t cols);
int64_t padded_rows(int64_t rows);    // to whole blocks
// Blocks of a chunk at most.
int most_blocks(int64_t batch);
// Blocks of a chunk: few enough that every thread has some.
int chunk_blocks(int n_blocks, int n_threads, int64_t batch);
void* aligned_new(size_t n_bytes);    // at a multiple of kAlignment
void aligned_delete(void* p);
// Memory for weights; pieces of a model lie in common huge pages, which the hardware reads
// ahead where it stops at the ends of small ones.
void* weights_new(size_t n_bytes);
void weights_delete(void* p, size_t n_bytes);

// Memory of the calling thread, kept between calls; grows only. Null when there is no memory.
class Arena {
public:
    ~Arena();
    bool reserve(size_t n_bytes);
    void* take(size_t n_bytes);    // at a multiple of kAlignment
    static size_t padded(size_t n_bytes) { return (n_bytes + kAlignment - 1) / kAlignment * kAlignment; }

private:
    char* memory_ = nullptr;
    size_t size_ = 0, used_ = 0;
};
Arena& thread_arena();

// int8 (batch, cols) rows at `stride` -> [padded / kQuadCols][batch][kQuadCols], zeros behind cols, and the
// sums.
void interleave(const int8_t* q, int64_t stride, int64_t cols, int batch, int8_t* x, int32_t* sums);

}  // namespace mpq
