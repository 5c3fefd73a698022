// Products with single entries, the core of the kernels of matrices and of convolutions.
//
// Examples are the lanes of vectors: an entry of a row and a channel multiplies the vectors of a tile of the channel, and
// the products are added to those of the row, so that every pattern vectorises. The sums of a tile stay in registers.
// What the entries of a block of channels meet, or of a panel of rows, fits the L1 cache. A matrix has one tap, a
// convolution one for each place of its kernel.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

namespace {

using at::Tensor;
using at::vec::Vectorized;

template <typename T>
constexpr int kLanes = Vectorized<T>::size();
constexpr int kAhead = 4; // rows between the prefetch of entries and their use
constexpr int kMost = 8; // vectors of a tile; as many sums stay in registers over all entries of a row
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kMostFused = 8;
#else
constexpr int kMostFused = 4; // the gradients keep two of each, and there are 16 registers
#endif

// ---------------------------------------------------------------------------------------------------------------------
// The kernels

// A's entries in the order of use by the product: of blocks of channels, and of the outputs of each.
template <typename T>
struct Forward {
  const int32_t* cut; // (blocks + 1, rows): where the entries of a block and row begin; they end where the next block's do
  const int32_t* offsets; // of each entry: from the tile to the vectors that it meets
  const T* values;
  int64_t rows, blocks;
};

// B's entries in the order of use by the gradients: of panels of rows, and of the channels of each; A's come first.
template <typename T>
struct Backward {
  const int32_t* cut; // (panels, channels, 2) and the end: where A's entries and those of B without A begin
  const int32_t* offsets;
  const T* values; // those of A
  T* sums; // gradients of the values, to which those of a tile are added
};

// Adds the products of one block of channels to a tile of the output; `bias` (or 0) begins the first block.
template <int R, int Q, typename T>
__attribute__((noinline)) void multiply(
    const Forward<T>& matrix, int64_t block, const T* inputs, int64_t input_row, const T* bias, T* out,
    int64_t out_plane, int64_t out_row) {
  using Vec = Vectorized<T>;
  constexpr int lanes = kLanes<T>;
  const int32_t *begins = matrix.cut + block * matrix.rows, *ends = begins + matrix.rows;
  for (int64_t row = 0; row < matrix.rows; ++row) {
    const int32_t begin = begins[row], end = ends[row];
    if (begin == end && block) {
      continue;
    }
    T* const result = out + row * out_plane;
    if (row + kAhead < matrix.rows) { // a block's entries of the next rows lie far apart
      const int32_t next = begins[row + kAhead];
      __builtin_prefetch(matrix.offsets + next);
      __builtin_prefetch(matrix.offsets + next + 16);
      __builtin_prefetch(matrix.values + next);
      __builtin_prefetch(matrix.values + next + 16);
    }
    Vec sums[R * Q];
#pragma GCC unroll 8
    for (int i = 0; i < R * Q; ++i) {
      sums[i] = block ? Vec::loadu(result + (i / Q) * out_row + (i % Q) * lanes) : Vec(bias ? bias[row] : T(0));
    }
    for (int32_t entry = begin; entry < end; ++entry) {
      const T* const meets = inputs + matrix.offsets[entry];
      const Vec value(matrix.values[entry]);
#pragma GCC unroll 8
      for (int i = 0; i < R * Q; ++i) {
        sums[i] = at::vec::fmadd(value, Vec::loadu(meets + (i / Q) * input_row + (i % Q) * lanes), sums[i]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < R * Q; ++i) {
      sums[i].store(result + (i / Q) * out_row + (i % Q) * lanes);
    }
  }
}

// Makes the compiler load a vector once for two uses, not for each.
template <typename Vec>
inline void keep(Vec& vector) {
#if defined(__AVX512F__)
  asm("" : "+v"(vector));
#elif defined(__AVX2__)
  asm("" : "+x"(vector));
#endif
}

// Returns the sums over the lanes of each vector, as the lanes of one vector.
template <typename T>
inline Vectorized<T> lane_sums(Vectorized<T>* vectors) {
#pragma GCC unroll 16
  for (int count = kLanes<T>; count > 1; count /= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < count / 2; ++i) {
      const auto [even, odd] = at::vec::deinterleave2(vectors[2 * i], vectors[2 * i + 1]);
      vectors[i] = even + odd;
    }
  }
  return vectors[0];
}

// Adds a tile's products of inputs and output gradients to the gradients of the values and, with `Fused`, of the input.
// `first`: the input's gradient begins at 0.
template <int R, int Q, bool Fused, typename T>
__attribute__((noinline)) void differentiate(
    const Backward<T>& matrix, const int32_t* cut, const T* grads, int64_t grad_row, const T* inputs,
    int64_t input_plane, int64_t input_row, T* out, bool first, int64_t first_channel, int64_t last_channel) {
  using Vec = Vectorized<T>;
  constexpr int lanes = kLanes<T>;
  for (int64_t channel = first_channel; channel < last_channel; ++channel) {
    const int32_t begin = cut[2 * channel], middle = cut[2 * channel + 1], end = cut[2 * channel + 2];
    if (begin == end && !(Fused && first)) {
      continue;
    }
    const T* const own = inputs + channel * input_plane;
    T* const result = Fused ? out + channel * input_plane : nullptr;
    Vec vectors[R * Q], sums[R * Q];
#pragma GCC unroll 8
    for (int i = 0; i < R * Q; ++i) {
      const int64_t at = (i / Q) * input_row + (i % Q) * lanes;
      vectors[i] = Vec::loadu(own + at);
      if (Fused) {
        sums[i] = first ? Vec(T(0)) : Vec::loadu(result + at);
      }
    }
    for (int32_t entry = begin; entry < end; entry += lanes) {
      const int count = std::min<int32_t>(end - entry, lanes);
      const int active = Fused ? std::clamp<int32_t>(middle - entry, 0, count) : 0;
      Vec products[lanes];
      int lane = 0;
      for (; lane < active; ++lane) {
        const T* const meets = grads + matrix.offsets[entry + lane];
        const Vec value(matrix.values[entry + lane]);
        Vec even(T(0)), odd(T(0));
#pragma GCC unroll 8
        for (int i = 0; i < R * Q; ++i) {
          Vec met = Vec::loadu(meets + (i / Q) * grad_row + (i % Q) * lanes);
          keep(met);
          Vec& product = i % 2 ? odd : even;
          product = at::vec::fmadd(vectors[i], met, product);
          sums[i] = at::vec::fmadd(value, met, sums[i]);
        }
        products[lane] = even + odd;
      }
      for (; lane < count; ++lane) {
        const T* const meets = grads + matrix.offsets[entry + lane];
        Vec even(T(0)), odd(T(0));
#pragma GCC unroll 8
        for (int i = 0; i < R * Q; ++i) {
          Vec& product = i % 2 ? odd : even;
          product = at::vec::fmadd(vectors[i], Vec::loadu(meets + (i / Q) * grad_row + (i % Q) * lanes), product);
        }
        products[lane] = even + odd;
      }
      const Vec total = lane_sums<T>(products);
      T* const target = matrix.sums + entry; // the array is a vector longer than its entries
      Vec known = Vec::loadu(target);
      if (count < lanes) { // the rest may belong to another thread
        (known + total).store(target, count);
      } else {
        (known + total).store(target);
      }
    }
    if (Fused) {
#pragma GCC unroll 8
      for (int i = 0; i < R * Q; ++i) {
        sums[i].store(result + (i / Q) * input_row + (i % Q) * lanes);
      }
    }
  }
}

// Calls `function` with the numbers of rows and columns of a tile as constants.
template <int Most, typename F, int... I>
void with_tile(int rows, int columns, const F& function, std::integer_sequence<int, I...>) {
  ((rows == 1 && columns == I + 1
        ? function(std::integral_constant<int, 1>(), std::integral_constant<int, I + 1>())
        : void()),
   ...);
  ((rows == 2 && columns == I / 2 + 1 && I % 2 == 0 && (I / 2 + 1) * 2 <= Most
        ? function(std::integral_constant<int, 2>(), std::integral_constant<int, I / 2 + 1>())
        : void()),
   ...);
}

template <int Most, typename F>
void with_tile(int rows, int columns, const F& function) {
  with_tile<Most>(rows, columns, function, std::make_integer_sequence<int, Most>());
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory that is used again by the next call of the same thread: new memory costs as much as a product

enum Use { kInputs, kOutputs, kInputGrads, kOffsets, kBackwardOffsets, kValues, kSums, kCut, kOrder, kKeys, kUses };

template <typename T>
T* scratch(Use use, int64_t count) {
  thread_local std::array<Tensor, kUses> kept;
  const int64_t bytes = std::max<int64_t>(count, 1) * sizeof(T);
  if (!kept[use].defined() || kept[use].numel() < bytes) {
    kept[use] = Tensor(); // freed first
    kept[use] = at::empty({bytes}, at::TensorOptions().dtype(at::kByte));
  }
  return reinterpret_cast<T*>(kept[use].template mutable_data_ptr<uint8_t>());
}

// ---------------------------------------------------------------------------------------------------------------------
// The places of the entries

// See pattern.py for the fields.
struct Index {
  int64_t rows, channels, taps, block, panel, active, updated;
  const int32_t* forward_cut;
  const int16_t* forward_keys;
  const int32_t* backward_cut;
  const int16_t* backward_keys;
  const int32_t* backward_order;
  int64_t blocks() const { return (channels + block - 1) / block; }
  int64_t panels() const { return (rows + panel - 1) / panel; }
};

using Tensors = at::ArrayRef<Tensor>;

Index index_of(at::IntArrayRef sizes, const Tensors& index) {
  TORCH_CHECK(sizes.size() == 7 && index.size() == 5, "expected the index of a sparse kernel");
  return {
      sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6],
      index[0].const_data_ptr<int32_t>(), index[1].const_data_ptr<int16_t>(), index[2].const_data_ptr<int32_t>(),
      index[3].const_data_ptr<int16_t>(), index[4].const_data_ptr<int32_t>()};
}

// ---------------------------------------------------------------------------------------------------------------------
// Making an index

Tensor ints(int64_t count) { return at::empty({count}, at::TensorOptions().dtype(at::kInt)); }
Tensor shorts(int64_t count) { return at::empty({count}, at::TensorOptions().dtype(at::kShort)); }

// Where an entry of the weight (rows, channels / groups, taps) lies, by its flat index.
struct Places {
  int64_t inner, taps, rows_of_group, channels_of_group;
  int64_t row(int64_t flat) const { return flat / inner; }
  int64_t channel(int64_t flat) const { return row(flat) / rows_of_group * channels_of_group + flat % inner / taps; }
  int64_t tap(int64_t flat) const { return flat % taps; }
};

Places places_of(int64_t rows, int64_t channels, int64_t taps, int64_t groups) {
  return {channels / groups * taps, taps, rows / groups, channels / groups};
}

// Turns the number of entries of each bin into where the bin begins.
void cumulate(int32_t* bins, int64_t count) {
  int32_t sum = 0;
  for (int64_t bin = 0; bin <= count; ++bin) {
    sum += std::exchange(bins[bin], sum);
  }
}

std::vector<Tensor> make_index(
    const Tensor& active, const Tensor& exploring, int64_t rows, int64_t channels, int64_t taps, int64_t groups,
    int64_t block, int64_t panel) {
  const Places places = places_of(rows, channels, taps, groups);
  const int64_t blocks = (channels + block - 1) / block, panels = (rows + panel - 1) / panel;
  const int64_t *const first = active.const_data_ptr<int64_t>(), *const second = exploring.const_data_ptr<int64_t>();
  const int64_t count = active.numel(), both = count + exploring.numel();

  // A's entries lie in the order of rows, and of a row's blocks
  const Tensor forward_cut = ints((blocks + 1) * rows), forward_keys = shorts(count);
  int32_t* const cut = forward_cut.mutable_data_ptr<int32_t>();
  int16_t* const keys = forward_keys.mutable_data_ptr<int16_t>();
  std::vector<int32_t> bins(rows * blocks + 1);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t channel = places.channel(first[i]);
    ++bins[places.row(first[i]) * blocks + channel / block];
    keys[i] = static_cast<int16_t>(channel % block * taps + places.tap(first[i]));
  }
  cumulate(bins.data(), rows * blocks);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t at = 0; at <= blocks; ++at) {
      cut[at * rows + row] = bins[row * blocks + at];
    }
  }

  const int64_t runs = panels * channels * 2;
  const Tensor backward_cut = at::zeros({runs + 1}, at::TensorOptions().dtype(at::kInt));
  const Tensor backward_keys = shorts(both), backward_order = ints(both);
  int32_t* const starts = backward_cut.mutable_data_ptr<int32_t>();
  int16_t* const met = backward_keys.mutable_data_ptr<int16_t>();
  int32_t* const order = backward_order.mutable_data_ptr<int32_t>();
  const auto run_of = [&](int64_t flat, int64_t set) {
    return 2 * (places.row(flat) / panel * channels + places.channel(flat)) + set;
  };
  for (int64_t i = 0; i < both; ++i) {
    ++starts[i < count ? run_of(first[i], 0) : run_of(second[i - count], 1)];
  }
  cumulate(starts, runs);
  std::vector<int32_t> next(starts, starts + runs);
  for (int64_t i = 0; i < both; ++i) {
    const int64_t flat = i < count ? first[i] : second[i - count];
    const int32_t at = next[run_of(flat, i >= count)]++;
    met[at] = static_cast<int16_t>(places.row(flat) % panel * taps + places.tap(flat));
    order[at] = static_cast<int32_t>(i);
  }
  return {forward_cut, forward_keys, backward_cut, backward_keys, backward_order};
}

// Returns the flat indices of the entries of an index.
Tensor flat_indices(Tensors index_tensors, at::IntArrayRef sizes, int64_t groups) {
  const Index index = index_of(sizes, index_tensors);
  const Places places = places_of(index.rows, index.channels, index.taps, groups);
  const Tensor result = at::empty({index.updated}, at::TensorOptions().dtype(at::kLong));
  int64_t* const flat = result.mutable_data_ptr<int64_t>();
  for (int64_t run = 0; run < index.panels() * index.channels; ++run) {
    const int64_t panel = run / index.channels * index.panel, channel = run % index.channels;
    for (int32_t entry = index.backward_cut[2 * run]; entry < index.backward_cut[2 * run + 2]; ++entry) {
      const int64_t key = index.backward_keys[entry], row = panel + key / index.taps;
      flat[index.backward_order[entry]] =
          row * places.inner + channel % places.channels_of_group * index.taps + key % index.taps;
    }
  }
  return result;
}

} // namespace
