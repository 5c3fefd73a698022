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
#include <torch/library.h>

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

// Where the vectors lie that an entry meets: an offset from the tile, for each entry.
struct Offsets {
  const int32_t* of;
  int64_t operator()(int32_t entry) const { return of[entry]; }
};

// The same for a matrix, whose tiles are rows of `Width` examples without gaps.
template <int Width>
struct TileRows {
  const int16_t* of;
  int64_t operator()(int32_t entry) const { return static_cast<int64_t>(of[entry]) * Width; }
};

// A's entries in the order of use by the product: of blocks of channels, and of the outputs of each.
template <typename T, typename P = Offsets>
struct Forward {
  const int32_t* cut; // (blocks + 1, all rows): where a block and row begin; they end where the next block's do
  P places;
  const T* values;
  int64_t rows, blocks, all_rows; // the rows are part of all
};

// B's entries in the order of use by the gradients: of panels of rows, and of the channels of each; A's come first.
template <typename T, typename P = Offsets>
struct Backward {
  const int32_t* cut; // (panels, channels, 2) and the end: where A's entries and those of B without A begin
  P places;
  const T* values; // those of A
  T* sums; // gradients of the values, to which those of a tile are added; a vector longer than the entries
};

// Adds the products of one block of channels to a tile of the output; `bias` (or 0) begins the first block.
template <int R, int Q, typename T, typename P>
__attribute__((noinline)) void multiply(
    const Forward<T, P>& matrix, int64_t block, const T* inputs, int64_t input_row, const T* bias, T* out,
    int64_t out_plane, int64_t out_row) {
  using Vec = Vectorized<T>;
  constexpr int lanes = kLanes<T>;
  const int32_t *begins = matrix.cut + block * matrix.all_rows, *ends = begins + matrix.all_rows;
  for (int64_t row = 0; row < matrix.rows; ++row) {
    const int32_t begin = begins[row], end = ends[row];
    if (begin == end && block) {
      continue;
    }
    T* const result = out + row * out_plane;
    if (row + kAhead < matrix.rows) { // a block's entries of the next rows lie far apart
      const int32_t next = begins[row + kAhead];
      __builtin_prefetch(matrix.places.of + next);
      __builtin_prefetch(matrix.places.of + next + 16);
      __builtin_prefetch(matrix.values + next);
      __builtin_prefetch(matrix.values + next + 16);
    }
    Vec sums[R * Q];
#pragma GCC unroll 8
    for (int i = 0; i < R * Q; ++i) {
      sums[i] = block ? Vec::loadu(result + (i / Q) * out_row + (i % Q) * lanes) : Vec(bias ? bias[row] : T(0));
    }
    for (int32_t entry = begin; entry < end; ++entry) {
      const T* const meets = inputs + matrix.places(entry);
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
template <int R, int Q, bool Fused, typename T, typename P>
__attribute__((noinline)) void differentiate(
    const Backward<T, P>& matrix, const int32_t* cut, const T* grads, int64_t grad_row, const T* inputs,
    int64_t input_plane, int64_t input_row, T* out, bool first, int64_t first_channel, int64_t last_channel) {
  using Vec = Vectorized<T>;
  constexpr int lanes = kLanes<T>, last_lane = lanes - 1;
  // the products of as many entries as there are lanes become the lanes of one vector, wherever a channel ends
  Vec products[lanes];
  std::fill_n(products, lanes, Vec(T(0)));
  const auto add = [&](int32_t last) {
    T* const target = matrix.sums + (last & ~last_lane);
    (Vec::loadu(target) + lane_sums<T>(products)).store(target);
  };
  for (int64_t channel = first_channel; channel < last_channel; ++channel) {
    int32_t entry = cut[2 * channel];
    const int32_t middle = Fused ? cut[2 * channel + 1] : entry, end = cut[2 * channel + 2];
    if (entry == end && !(Fused && first)) {
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
    while (entry < end) {
      const int32_t stop = std::min<int32_t>(end, (entry | last_lane) + 1), active = std::min(stop, middle);
      for (; entry < active; ++entry) {
        const T* const meets = grads + matrix.places(entry);
        const Vec value(matrix.values[entry]);
        Vec even(T(0)), odd(T(0));
#pragma GCC unroll 8
        for (int i = 0; i < R * Q; ++i) {
          Vec met = Vec::loadu(meets + (i / Q) * grad_row + (i % Q) * lanes);
          keep(met);
          Vec& product = i % 2 ? odd : even;
          product = at::vec::fmadd(vectors[i], met, product);
          sums[i] = at::vec::fmadd(value, met, sums[i]);
        }
        products[entry & last_lane] = even + odd;
      }
      for (; entry < stop; ++entry) {
        const T* const meets = grads + matrix.places(entry);
        Vec even(T(0)), odd(T(0));
#pragma GCC unroll 8
        for (int i = 0; i < R * Q; ++i) {
          Vec& product = i % 2 ? odd : even;
          product = at::vec::fmadd(vectors[i], Vec::loadu(meets + (i / Q) * grad_row + (i % Q) * lanes), product);
        }
        products[entry & last_lane] = even + odd;
      }
      if (!(entry & last_lane)) {
        add(entry - 1);
      }
    }
    if (Fused) {
#pragma GCC unroll 8
      for (int i = 0; i < R * Q; ++i) {
        sums[i].store(result + (i / Q) * input_row + (i % Q) * lanes);
      }
    }
  }
  const int32_t end = cut[2 * last_channel];
  if (end > cut[2 * first_channel] && (end & last_lane)) {
    std::fill(products + (end & last_lane), products + lanes, Vec(T(0)));
    add(end);
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

// How many blocks or panels of some size there are; even of nothing there is one, whose results are zero.
int64_t parts(int64_t count, int64_t size) { return std::max<int64_t>((count + size - 1) / size, 1); }

// See entries.py for the fields.
struct Index {
  int64_t rows, channels, taps, block, panel, active, updated;
  const int32_t* forward_cut;
  const int16_t* forward_keys;
  const int32_t* backward_cut;
  const int16_t* backward_keys;
  const int32_t* backward_order;
  const int32_t* forward_order; // null: the values lie in the order of the product
  int64_t blocks() const { return parts(channels, block); }
  int64_t panels() const { return parts(rows, panel); }
};

using Tensors = at::ArrayRef<Tensor>;

Index index_of(at::IntArrayRef sizes, const Tensors& index) {
  TORCH_CHECK(sizes.size() == 7 && (index.size() == 5 || index.size() == 6), "expected the index of a sparse weight");
  return {
      sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6],
      index[0].const_data_ptr<int32_t>(), index[1].const_data_ptr<int16_t>(), index[2].const_data_ptr<int32_t>(),
      index[3].const_data_ptr<int16_t>(), index[4].const_data_ptr<int32_t>(),
      index.size() == 6 ? index[5].const_data_ptr<int32_t>() : nullptr};
}

// ---------------------------------------------------------------------------------------------------------------------
// Making an index

Tensor ints(int64_t count) { return at::empty({count}, at::TensorOptions().dtype(at::kInt)); }
Tensor shorts(int64_t count) { return at::empty({count}, at::TensorOptions().dtype(at::kShort)); }

// Where an entry of the weight lies. The weight is (rows, channels / groups, taps), or transposed (channels, rows, taps).
struct Places {
  int64_t second_size, taps, rows_of_group;
  bool transposed;
  int64_t first_size() const { return second_size * taps; }

  // Calls `function(i, row, channel, tap)` for the flat indices of entries, which increase.
  template <typename F>
  void for_entries(const Tensor& indices, const F& function) const {
    taps == 1 ? for_entries<true>(indices, function) : for_entries<false>(indices, function);
  }
  template <bool OneTap, typename F>
  void for_entries(const Tensor& indices, const F function) const {
    const int64_t* const flat = indices.const_data_ptr<int64_t>();
    const int64_t count = indices.numel(), size = first_size();
    const auto width = static_cast<uint32_t>(taps);
    int64_t i = 0;
    for (int64_t first = 0; i < count; ++first) {
      const int64_t begin = first * size, end = begin + size;
      const int64_t group = transposed ? 0 : first / rows_of_group * second_size; // the first channel of the group
      for (; i < count && flat[i] < end; ++i) {
        const auto rest = static_cast<uint32_t>(flat[i] - begin);
        const uint32_t second = OneTap ? rest : rest / width, tap = OneTap ? 0 : rest % width;
        transposed ? function(i, second, first, tap) : function(i, first, group + second, tap);
      }
    }
  }
};

Places places_of(int64_t rows, int64_t channels, int64_t taps, int64_t groups, bool transposed) {
  return {transposed ? rows : channels / groups, taps, rows / groups, transposed};
}

// Turns the number of entries of each bin into where the bin begins.
void cumulate(int32_t* bins, int64_t count) {
  int32_t sum = 0;
  for (int64_t bin = 0; bin <= count; ++bin) {
    sum += std::exchange(bins[bin], sum);
  }
}

// Which part of `size` each of `count` is in, and the first key of each in its part; tables are faster than divisions.
struct Parts {
  std::vector<int32_t> part, key;
  Parts(int64_t count, int64_t size, int64_t taps) : part(count), key(count) {
    for (int64_t i = 0; i < count; ++i) {
      part[i] = static_cast<int32_t>(i / size);
      key[i] = static_cast<int32_t>(i % size * taps);
    }
  }
};

// Makes the index of flat indices that increase strictly and are within the weight.
std::vector<Tensor> make_index(
    const Tensor& active, const Tensor& exploring, int64_t rows, int64_t channels, int64_t taps, int64_t groups,
    bool transposed, int64_t block, int64_t panel) {
  const Places places = places_of(rows, channels, taps, groups, transposed);
  const int64_t blocks = parts(channels, block), panels = parts(rows, panel);
  const int64_t count = active.numel(), both = count + exploring.numel();

  // A's entries lie in the order of rows, and of a row's blocks
  const Parts of_channel(channels, block, taps), of_row(rows, panel, taps);
  const int32_t *const block_of = of_channel.part.data(), *const key_of_channel = of_channel.key.data();
  const int32_t *const panel_of = of_row.part.data(), *const key_of_row = of_row.key.data();
  const Tensor forward_cut = ints((blocks + 1) * rows), forward_keys = shorts(count);
  const Tensor forward_order = ints(transposed ? count : 0);
  int32_t *const cut = forward_cut.mutable_data_ptr<int32_t>(), *const from = forward_order.mutable_data_ptr<int32_t>();
  int16_t* const keys = forward_keys.mutable_data_ptr<int16_t>();
  std::vector<int32_t> bins_of(rows * blocks + 1);
  int32_t* const bins = bins_of.data();
  places.for_entries(active, [=](int64_t i, int64_t row, int64_t channel, int64_t tap) {
    ++bins[row * blocks + block_of[channel]];
    keys[i] = static_cast<int16_t>(key_of_channel[channel] + tap);
  });
  cumulate(bins, rows * blocks);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t at = 0; at <= blocks; ++at) {
      cut[at * rows + row] = bins[row * blocks + at];
    }
  }
  if (transposed) {
    places.for_entries(active, [=](int64_t i, int64_t row, int64_t channel, int64_t tap) {
      const int32_t at = bins[row * blocks + block_of[channel]]++;
      keys[at] = static_cast<int16_t>(key_of_channel[channel] + tap);
      from[at] = static_cast<int32_t>(i);
    });
  }

  const int64_t runs = panels * channels * 2;
  const Tensor backward_cut = at::zeros({runs + 1}, at::TensorOptions().dtype(at::kInt));
  const Tensor backward_keys = shorts(both), backward_order = ints(both);
  int32_t* const starts = backward_cut.mutable_data_ptr<int32_t>();
  int16_t* const met = backward_keys.mutable_data_ptr<int16_t>();
  int32_t* const order = backward_order.mutable_data_ptr<int32_t>();
  const Tensor sets[] = {active, exploring};
  for (int set = 0; set < 2; ++set) {
    places.for_entries(sets[set], [=](int64_t, int64_t row, int64_t channel, int64_t) {
      ++starts[2 * (panel_of[row] * channels + channel) + set];
    });
  }
  cumulate(starts, runs);
  std::vector<int32_t> next_of(starts, starts + runs);
  int32_t* const next = next_of.data();
  for (int set = 0; set < 2; ++set) {
    places.for_entries(sets[set], [=](int64_t i, int64_t row, int64_t channel, int64_t tap) {
      const int32_t at = next[2 * (panel_of[row] * channels + channel) + set]++;
      met[at] = static_cast<int16_t>(key_of_row[row] + tap);
      order[at] = static_cast<int32_t>(i + set * count);
    });
  }
  std::vector<Tensor> index{forward_cut, forward_keys, backward_cut, backward_keys, backward_order};
  if (transposed) {
    index.push_back(forward_order);
  }
  return index;
}

// Returns the flat indices of the entries of an index.
Tensor flat_indices(Tensors index_tensors, at::IntArrayRef sizes, int64_t groups, bool transposed) {
  const Index index = index_of(sizes, index_tensors);
  const Places places = places_of(index.rows, index.channels, index.taps, groups, transposed);
  const int64_t by_row = transposed ? index.taps : places.first_size();
  std::vector<int64_t> of_key(index.panel * index.taps); // in its panel and for the first channel
  for (int64_t key = 0; key < static_cast<int64_t>(of_key.size()); ++key) {
    of_key[key] = key / index.taps * by_row + key % index.taps;
  }
  const Tensor result = at::empty({index.updated}, at::TensorOptions().dtype(at::kLong));
  int64_t* const flat = result.mutable_data_ptr<int64_t>();
  for (int64_t run = 0; run < index.panels() * index.channels; ++run) {
    const int64_t channel = run % index.channels, panel = run / index.channels * index.panel;
    const int64_t first = panel * by_row +
        (transposed ? channel * places.first_size() : channel % places.second_size * index.taps);
    for (int32_t entry = index.backward_cut[2 * run]; entry < index.backward_cut[2 * run + 2]; ++entry) {
      flat[index.backward_order[entry]] = first + of_key[index.backward_keys[entry]];
    }
  }
  return result;
}

// The libraries of matrices and of convolutions both hold these; the first one that is loaded registers them.
[[maybe_unused]] const bool registers = [] {
  const auto known = c10::Dispatcher::singleton().findSchemaOrThrow("topkast::entry_index", "");
  if (known.hasKernelForDispatchKey(c10::DispatchKey::CPU)) {
    return false;
  }
  static torch::Library library(torch::Library::IMPL, "topkast", c10::DispatchKey::CPU, __FILE__, __LINE__);
  library.impl("entry_index", make_index);
  library.impl("entry_flat_indices", flat_indices);
  return true;
}();

} // namespace
