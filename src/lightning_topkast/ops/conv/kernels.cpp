// Convolutions with an unstructured sparse kernel, and their gradients: direct, without an im2col.
//
// Examples are the lanes of vectors: a channel's map holds, for each pixel, one vector of examples. An entry of the kernel
// multiplies the vectors of a tile of pixels, shifted by its place, so that every pattern vectorises; the sums of a tile
// stay in registers. The border of a map is zero, which is the padding. With a stride, the pixels that the same places of
// the kernel meet, a phase, are maps of their own, so that all steps within a map are 1. A few rows of pixels, a band, are
// converted, computed and converted back together, since their maps fit the L2 cache; of these, what the entries of a
// block of channels meet, or of a panel of outputs, fits the L1 cache.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

using at::Tensor;
using at::vec::Vectorized;

template <typename T>
constexpr int kLanes = Vectorized<T>::size();
constexpr int64_t kBandBytes = 1 << 19; // of maps that are computed together, which fit a typical L2 cache
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

// Looks up each entry's offset: from the first channel of its block, or the first row of its panel.
const int32_t* offsets_of(const int16_t* keys, int64_t count, const std::vector<int32_t>& table, Use use) {
  int32_t* const offsets = scratch<int32_t>(use, count);
  const int32_t* const of = table.data();
  at::parallel_for(0, count, 1 << 15, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      offsets[i] = of[keys[i]];
    }
  });
  return offsets;
}

template <typename T>
Forward<T> forward_of(const Index& index, const std::vector<int32_t>& table, const T* values) {
  return {
      index.forward_cut, offsets_of(index.forward_keys, index.active, table, kOffsets), values, index.rows,
      index.blocks()};
}

// The backward index of a layer whose steps over the input are longer than 1: its channels are split by the places of
// the input that a tap meets, its phases.
struct Phases {
  const int32_t* cut;
  const int32_t* order;
  const int16_t* keys;
};

Phases split(const Index& index, const std::vector<int>& phase_of, int phases) {
  if (phases == 1) {
    return {index.backward_cut, index.backward_order, index.backward_keys};
  }
  const int64_t panels = index.panels();
  int32_t* const cut = scratch<int32_t>(kCut, panels * phases * index.channels * 2 + 1);
  int32_t* const order = scratch<int32_t>(kOrder, index.updated);
  int16_t* const keys = scratch<int16_t>(kKeys, index.updated);
  int64_t at = 0, next = 0;
  for (int64_t panel = 0; panel < panels; ++panel) {
    for (int phase = 0; phase < phases; ++phase) {
      for (int64_t channel = 0; channel < index.channels; ++channel) {
        const int32_t* const from = index.backward_cut + 2 * (panel * index.channels + channel);
        for (int exploring = 0; exploring < 2; ++exploring) {
          cut[next++] = static_cast<int32_t>(at);
          for (int32_t entry = from[exploring]; entry < from[exploring + 1]; ++entry) {
            if (phase_of[index.backward_keys[entry] % index.taps] == phase) {
              order[at] = index.backward_order[entry];
              keys[at++] = index.backward_keys[entry];
            }
          }
        }
      }
    }
  }
  cut[next] = static_cast<int32_t>(at);
  return {cut, order, keys};
}

// Runs `function(backward, begin, end)` for all of a number of tasks, on several threads, and adds up their sums.
template <typename T, typename F>
void with_backward(
    const Index& index, const Phases& phases, const int32_t* offsets, const T* values, T* gradient, int64_t tasks,
    const F& function) {
  T* const ordered = scratch<T>(kValues, index.updated);
  at::parallel_for(0, index.updated, 1 << 15, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      ordered[i] = values[phases.order[i]];
    }
  });
  // of each part, not of each thread: a compiler's own OpenMP may have other threads than PyTorch's
  const int64_t parts = std::min<int64_t>(tasks, at::get_num_threads()), length = index.updated + kLanes<T>;
  T* const sums = scratch<T>(kSums, parts * length);
  at::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) {
      T* const own = sums + part * length;
      std::fill_n(own, length, T(0));
      function(Backward<T>{phases.cut, offsets, ordered, own}, part * tasks / parts, (part + 1) * tasks / parts);
    }
  });
  if (gradient) {
    at::parallel_for(0, index.updated, 1 << 15, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        T sum(0);
        for (int64_t part = 0; part < parts; ++part) {
          sum += sums[part * length + i];
        }
        gradient[phases.order[i]] = sum;
      }
    });
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Convolutions

// One of the two directions of a convolution.
struct Side {
  int64_t in, out, kernel, stride, dilation, pad;
  int64_t reach() const { return (kernel - 1) * dilation / stride; }
  int phase(int64_t tap) const { return static_cast<int>(tap * dilation % stride); }
  int64_t shift(int64_t tap) const { return tap * dilation / stride; }
  // positions of a phase's inputs, in steps of the stride
  int64_t first(int64_t phase) const { return pad > phase ? (pad - phase + stride - 1) / stride : 0; }
  int64_t end(int64_t phase) const {
    return std::max(first(phase), pad + in > phase ? (pad + in - 1 - phase) / stride + 1 : int64_t(0));
  }
  int64_t longest() const {
    int64_t most = 0;
    for (int64_t phase = 0; phase < stride; ++phase) {
      most = std::max(most, end(phase) - first(phase));
    }
    return most;
  }
};

constexpr int64_t ceil_to(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

struct Shape {
  int rows, columns;
};

// Returns the tile of at most `most` vectors that covers a map best.
Shape tile_for(int64_t height, int64_t width, int64_t reach_h, int64_t reach_w, int most) {
  Shape best{1, 1};
  double least = 1e300;
  for (int rows = 1; rows <= 2; ++rows) {
    for (int columns = 1; rows * columns <= most; ++columns) {
      const int64_t tiles = ceil_to(height, rows) / rows * (ceil_to(width, columns) / columns);
      // an entry costs about as much as two more vectors, and a tile meets its surroundings too
      const double cost = tiles * (rows * columns + 2 + 0.05 * ((rows + reach_h) * (columns + reach_w)));
      if (cost < least) {
        least = cost;
        best = {rows, columns};
      }
    }
  }
  return best;
}

struct Geometry {
  Side vertical, horizontal;
  int64_t taps() const { return vertical.kernel * horizontal.kernel; }
  int phases() const { return static_cast<int>(vertical.stride * horizontal.stride); }
  int phase(int64_t tap) const {
    return static_cast<int>(
        vertical.phase(tap / horizontal.kernel) * horizontal.stride + horizontal.phase(tap % horizontal.kernel));
  }
};

// A map of vectors, of which each channel has its own.
struct Map {
  int64_t height, width, lanes;
  // an odd number of vectors, so that the same position of all channels spreads over the cache
  int64_t plane() const { return (height * width | 1) * lanes; }
  int64_t row() const { return width * lanes; }
};

// Transposes lanes vectors in place: n rounds of a perfect shuffle.
template <typename T>
inline void transpose(Vectorized<T>* vectors) {
  constexpr int lanes = kLanes<T>;
  Vectorized<T> other[lanes];
  Vectorized<T>*from = vectors, *to = other;
#pragma GCC unroll 5
  for (int round = 1; round < lanes; round *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < lanes / 2; ++i) {
      const auto [low, high] = at::vec::interleave2(from[i], from[i + lanes / 2]);
      to[2 * i] = low;
      to[2 * i + 1] = high;
    }
    std::swap(from, to);
  }
  if (from != vectors) {
    std::copy_n(from, lanes, vectors);
  }
}

// A batch of images: a tensor (examples, channels, height, width), of which either the width or the channels are
// neighbours in memory.
template <typename T>
struct Images {
  T* data;
  int64_t examples, channels, height, width;
  int64_t by_example, by_channel, by_row, by_column;
};

template <typename T>
Images<T> images_of(const Tensor& tensor) {
  // the stride of a single column may be anything
  const bool by_width = tensor.size(3) == 1 && tensor.stride(1) != 1;
  return {
      static_cast<T*>(tensor.data_ptr()), tensor.size(0), tensor.size(1), tensor.size(2), tensor.size(3),
      tensor.stride(0), tensor.stride(1), tensor.stride(2), by_width ? 1 : tensor.stride(3)};
}

// Copies between the images of one group of examples and their maps. `place(row, column)` is the place of a pixel in its
// channel's map, negative if it has none.
template <bool In, typename T, typename P>
void convert(const Images<T>& images, int64_t first, T* maps, int64_t plane, const P& place) {
  using Vec = Vectorized<T>;
  constexpr int lanes = kLanes<T>;
  const int count = static_cast<int>(std::min<int64_t>(lanes, images.examples - first));
  T* const data = images.data + first * images.by_example;
  const bool by_width = images.by_column == 1 && (images.by_channel != 1 || images.channels == 1);
  // the other direction whose elements are neighbours in memory
  const int64_t inner = by_width ? images.width : images.channels, outer = by_width ? images.channels : images.width;
  for (int64_t row = 0; row < images.height; ++row) {
    for (int64_t other = 0; other < outer; ++other) { // rows of a channel, or pixels of a row
      T* const line = data + row * images.by_row + other * (by_width ? images.by_channel : images.by_column);
      const int64_t pixel = by_width ? 0 : place(row, other);
      if (In && !by_width && pixel < 0) {
        continue;
      }
      for (int64_t start = 0; start < inner; start += lanes) {
        const int width = static_cast<int>(std::min<int64_t>(lanes, inner - start));
        const auto target = [&](int i) -> T* {
          const int64_t at = by_width ? place(row, start + i) : pixel;
          return at < 0 ? nullptr : maps + (by_width ? other : start + i) * plane + at;
        };
        Vec vectors[lanes];
        const bool full = count == lanes && width == lanes; // the compiler unrolls the loops without conditions
        if (In) {
          if (full) {
#pragma GCC unroll 16
            for (int i = 0; i < lanes; ++i) {
              vectors[i] = Vec::loadu(line + i * images.by_example + start);
            }
          } else {
            for (int i = 0; i < lanes; ++i) {
              vectors[i] = i < count ? Vec::loadu(line + i * images.by_example + start, width) : Vec(T(0));
            }
          }
          transpose<T>(vectors);
          if (full && !by_width) {
            T* const to = target(0);
#pragma GCC unroll 16
            for (int i = 0; i < lanes; ++i) {
              vectors[i].store(to + i * plane);
            }
          } else {
            for (int i = 0; i < width; ++i) {
              if (T* const to = target(i)) {
                vectors[i].store(to);
              }
            }
          }
        } else {
          if (full && !by_width && pixel >= 0) {
            const T* const from = target(0);
#pragma GCC unroll 16
            for (int i = 0; i < lanes; ++i) {
              vectors[i] = Vec::loadu(from + i * plane);
            }
          } else {
            for (int i = 0; i < lanes; ++i) {
              const T* const from = i < width ? target(i) : nullptr;
              vectors[i] = from ? Vec::loadu(from) : Vec(T(0));
            }
          }
          transpose<T>(vectors);
          if (full) {
#pragma GCC unroll 16
            for (int i = 0; i < lanes; ++i) {
              vectors[i].store(line + i * images.by_example + start);
            }
          } else {
            for (int i = 0; i < count; ++i) {
              vectors[i].store(line + i * images.by_example + start, width);
            }
          }
        }
      }
    }
  }
}

// Zeroes the places of maps outside a rectangle.
template <typename T>
void zero_border(T* maps, int64_t channels, const Map& map, int64_t top, int64_t bottom, int64_t left, int64_t right) {
  for (int64_t channel = 0; channel < channels; ++channel) {
    T* const plane = maps + channel * map.plane();
    std::fill(plane, plane + top * map.row(), T(0));
    std::fill(plane + bottom * map.row(), plane + map.plane(), T(0));
    for (int64_t row = top; row < bottom; ++row) {
      std::fill_n(plane + row * map.row(), left * map.lanes, T(0));
      std::fill_n(plane + row * map.row() + right * map.lanes, (map.width - right) * map.lanes, T(0));
    }
  }
}

// The inputs of a convolution in maps, those of each phase apart.
struct Inputs {
  Geometry geometry;
  Map map;
  int64_t channels;
  std::vector<bool> used; // phases that a tap meets

  template <typename T>
  void zero_borders(T* maps) const {
    const Side &v = geometry.vertical, &h = geometry.horizontal;
    for (int phase = 0; phase < geometry.phases(); ++phase) {
      const int64_t pv = phase / h.stride, ph = phase % h.stride;
      if (used[phase]) {
        zero_border(
            maps + phase * channels * map.plane(), channels, map, v.first(pv), v.end(pv), h.first(ph), h.end(ph));
      }
    }
  }

  // Returns where a pixel lies, or a negative number if no tap meets it.
  int64_t operator()(int64_t row, int64_t column) const {
    const Side &v = geometry.vertical, &h = geometry.horizontal;
    row += v.pad;
    column += h.pad;
    if (v.stride == 1 && h.stride == 1) {
      return (row * map.width + column) * map.lanes;
    }
    const int64_t phase = row % v.stride * h.stride + column % h.stride;
    const int64_t at = (row / v.stride * map.width + column / h.stride) * map.lanes;
    return used[phase] ? phase * channels * map.plane() + at : -1;
  }
};

Inputs inputs_of(const Geometry& geometry, int64_t channels, const Map& map) {
  std::vector<bool> used(geometry.phases());
  for (int64_t tap = 0; tap < geometry.taps(); ++tap) {
    used[geometry.phase(tap)] = true;
  }
  return {geometry, map, channels, used};
}

// Offsets must fit 32 bits; a group of images whose maps are larger does not fit a machine's memory either.
void check_size(int64_t elements) {
  TORCH_CHECK(elements < (int64_t(1) << 31), "the maps of a packed convolution are too large: ", elements, " elements");
}

// Rows of a convolution that are computed together, as a convolution of its own, so that their maps fit the L2 cache.
struct Band {
  Side vertical;
  int64_t image_row, output_row; // the first ones
};

// Returns the number of rows of a band, a multiple of the tile's, of all `rows`.
int64_t rows_of_band(int64_t rows, int64_t tile, int64_t bytes_of_row, int64_t groups) {
  int64_t most = std::max<int64_t>(kBandBytes / std::max<int64_t>(bytes_of_row, 1), 1);
  const int64_t wanted = (2 * at::get_num_threads() + groups - 1) / groups; // bands for all threads
  if (at::get_num_threads() > 1) {
    most = std::min(most, (rows + wanted - 1) / wanted);
  }
  const int64_t bands = (rows + most - 1) / most;
  return ceil_to((rows + bands - 1) / bands, tile);
}

// Bands by rows of the output, with all inputs that they meet.
std::vector<Band> output_bands(const Side& side, int64_t rows) {
  std::vector<Band> bands;
  for (int64_t row = 0; row < side.out; row += rows) {
    const int64_t out = std::min(rows, side.out - row);
    const int64_t from = std::clamp<int64_t>(row * side.stride - side.pad, 0, side.in);
    const int64_t reached = (row + out - 1) * side.stride + (side.kernel - 1) * side.dilation + 1 - side.pad;
    const int64_t to = std::clamp<int64_t>(reached, from, side.in);
    const int64_t pad = from + side.pad - row * side.stride; // not negative, since from is not below the band
    bands.push_back({{to - from, out, side.kernel, side.stride, side.dilation, pad}, from, row});
  }
  return bands;
}

// Bands by rows of the input, with all outputs that meet them.
std::vector<Band> input_bands(const Side& side, int64_t rows) {
  std::vector<Band> bands;
  for (int64_t row = 0; row < side.in; row += rows) {
    const int64_t in = std::min(rows, side.in - row);
    const int64_t lowest = row + side.pad - (side.kernel - 1) * side.dilation;
    const int64_t from = lowest > 0 ? std::min(lowest / side.stride, side.out) : 0;
    const int64_t to = std::clamp((row + in - 1 + side.pad) / side.stride + 1, from, side.out);
    bands.push_back(
        {{in, to - from, side.kernel, side.stride, side.dilation, row + side.pad - from * side.stride}, row, from});
  }
  return bands;
}

template <typename T>
Images<T> rows_of(Images<T> images, int64_t first, int64_t count) {
  if (images.data) {
    images.data += first * images.by_row;
    images.height = count;
  }
  return images;
}

// Shortens the rows of a 1×1 kernel, which meets every pixel alone, so that the maps of a row fit the cache even with
// many channels: the images become (examples, channels, pixels / width, width). Their channels are neighbours in memory;
// otherwise short rows would be read from many places.
template <typename T>
void shorten_rows(Geometry& geometry, std::initializer_list<Images<T>*> batches) {
  const Side &v = geometry.vertical, &h = geometry.horizontal;
  const int64_t pixels = v.in * h.in;
  int64_t width = kMost;
  while (pixels % width) {
    --width;
  }
  const auto merge = [](const Images<T>* images) {
    return images->by_channel == 1 && images->by_row == images->width * images->by_column;
  };
  if (geometry.taps() > 1 || v.stride * h.stride > 1 || v.pad + h.pad > 0 || width < kMost / 2 || width >= h.in ||
      !std::all_of(batches.begin(), batches.end(), merge)) {
    return;
  }
  geometry = {{pixels / width, pixels / width, 1, 1, 1, 0}, {width, width, 1, 1, 1, 0}};
  for (Images<T>* images : batches) {
    images->height = pixels / width;
    images->width = width;
    images->by_row = width * images->by_column;
  }
}

template <typename T>
void convolve(
    const Index& index, const Geometry& geometry, const T* values, const T* bias, const Images<T>& images,
    const Images<T>& result) {
  constexpr int64_t lanes = kLanes<T>;
  const Side& h = geometry.horizontal;
  const Shape tile = tile_for(geometry.vertical.out, h.out, geometry.vertical.reach(), h.reach(), kMost);
  const int phases = geometry.phases();
  const int64_t out_width = ceil_to(h.out, tile.columns);
  int64_t height = 0, width = out_width + h.reach(), out_height = 0;
  for (int64_t phase = 0; phase < h.stride; ++phase) {
    width = std::max(width, h.end(phase));
  }
  const int64_t bytes = (phases * index.channels * width + index.rows * out_width) * lanes * sizeof(T);
  const int64_t groups = (images.examples + lanes - 1) / lanes;
  const std::vector<Band> bands =
      output_bands(geometry.vertical, rows_of_band(geometry.vertical.out, tile.rows, bytes, groups));
  for (const Band& band : bands) {
    out_height = std::max(out_height, ceil_to(band.vertical.out, tile.rows));
    for (int64_t phase = 0; phase < band.vertical.stride; ++phase) {
      height = std::max(height, band.vertical.end(phase));
    }
  }
  height = std::max(height, out_height + geometry.vertical.reach());
  const Map map{height, width, lanes}, outputs{out_height, out_width, lanes};
  const int64_t size = phases * index.channels * map.plane();
  check_size(std::max(size, index.rows * outputs.plane()));

  std::vector<int32_t> table(index.block * index.taps);
  for (int64_t key = 0; key < static_cast<int64_t>(table.size()); ++key) {
    const int64_t channel = key / index.taps, tap = key % index.taps;
    table[key] = static_cast<int32_t>(
        (geometry.phase(tap) * index.channels + channel) * map.plane() +
        geometry.vertical.shift(tap / h.kernel) * map.row() + h.shift(tap % h.kernel) * lanes);
  }
  const Forward<T> matrix = forward_of(index, table, values);
  const auto of_output = [&](int64_t row, int64_t column) { return (row * outputs.width + column) * lanes; };
  at::parallel_for(0, groups * bands.size(), 1, [&](int64_t begin, int64_t end) {
    T* const maps = scratch<T>(kInputs, size);
    T* const out = scratch<T>(kOutputs, index.rows * outputs.plane());
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task / bands.size() * lanes;
      const Band& band = bands[task % bands.size()];
      const Inputs inputs = inputs_of({band.vertical, h}, index.channels, map);
      inputs.zero_borders(maps);
      convert<true>(rows_of(images, band.image_row, band.vertical.in), first, maps, map.plane(), inputs);
      with_tile<kMost>(tile.rows, tile.columns, [&](auto rows, auto columns) {
        for (int64_t row = 0; row < band.vertical.out; row += rows()) {
          for (int64_t column = 0; column < h.out; column += columns()) {
            const T* const from = maps + row * map.row() + column * lanes;
            for (int64_t block = 0; block < matrix.blocks; ++block) {
              multiply<rows(), columns()>(
                  matrix, block, from + block * index.block * map.plane(), map.row(), bias,
                  out + of_output(row, column), outputs.plane(), outputs.row());
            }
          }
        }
      });
      convert<false>(rows_of(result, band.output_row, band.vertical.out), first, out, outputs.plane(), of_output);
    }
  });
}

// `result` may be without data: then the gradient of the input is not computed.
template <typename T>
void convolve_back(
    const Index& index, const Geometry& geometry, const T* values, const Images<T>& images, const Images<T>& grads,
    const Images<T>& result, T* values_grad) {
  constexpr int64_t lanes = kLanes<T>;
  const Side& h = geometry.horizontal;
  const Shape tile =
      tile_for(geometry.vertical.longest(), h.longest(), geometry.vertical.reach(), h.reach(), kMostFused);
  const int phases = geometry.phases();
  int64_t height = 0, width = 0, out_height = 0; // of the maps
  for (int64_t phase = 0; phase < h.stride; ++phase) {
    width = std::max(width, h.first(phase) + ceil_to(h.end(phase) - h.first(phase), tile.columns));
  }
  const int64_t out_width = h.reach() + std::max(h.out, width);
  const int64_t stride = geometry.vertical.stride;
  const int64_t bytes = (2 * phases * index.channels * width + index.rows * out_width) * lanes * sizeof(T);
  const int64_t groups = (images.examples + lanes - 1) / lanes;
  const std::vector<Band> bands = input_bands(
      geometry.vertical,
      stride * rows_of_band((geometry.vertical.in + stride - 1) / stride, tile.rows, bytes, groups));
  for (const Band& band : bands) {
    out_height = std::max(out_height, band.vertical.out);
    for (int64_t phase = 0; phase < stride; ++phase) {
      const int64_t first = band.vertical.first(phase);
      height = std::max(height, first + ceil_to(band.vertical.end(phase) - first, tile.rows));
    }
  }
  const Map map{height, width, lanes};
  // tap t of input position i meets output i - shift(t): the border is zero
  const int64_t top = geometry.vertical.reach(), left = h.reach();
  const Map outputs{top + std::max(out_height, height), out_width, lanes};
  const int64_t plane = map.plane(), size = phases * index.channels * plane;
  check_size(std::max(size, index.rows * outputs.plane()));

  std::vector<int> phase_of(index.taps);
  for (int64_t tap = 0; tap < index.taps; ++tap) {
    phase_of[tap] = geometry.phase(tap);
  }
  std::vector<int32_t> table(index.panel * index.taps);
  for (int64_t key = 0; key < static_cast<int64_t>(table.size()); ++key) {
    const int64_t row = key / index.taps, tap = key % index.taps;
    table[key] = static_cast<int32_t>(
        row * outputs.plane() + (top - geometry.vertical.shift(tap / h.kernel)) * outputs.row() +
        (left - h.shift(tap % h.kernel)) * lanes);
  }
  const auto of_output = [&](int64_t row, int64_t column) {
    return ((row + top) * outputs.width + column + left) * lanes;
  };
  const Phases split_index = split(index, phase_of, phases);
  const int32_t* const offsets = offsets_of(split_index.keys, index.updated, table, kBackwardOffsets);
  with_backward<T>(index, split_index, offsets, values, values_grad, groups * bands.size(),
                   [&](const Backward<T>& matrix, int64_t begin, int64_t end) {
    T* const maps = scratch<T>(kInputs, size);
    T* const met = scratch<T>(kOutputs, index.rows * outputs.plane());
    T* const out = result.data ? scratch<T>(kInputGrads, size) : nullptr;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t example = task / bands.size() * lanes;
      const Band& band = bands[task % bands.size()];
      const Side& v = band.vertical;
      const Inputs inputs = inputs_of({v, h}, index.channels, map);
      inputs.zero_borders(maps);
      zero_border(met, index.rows, outputs, top, top + v.out, left, left + h.out);
      convert<true>(rows_of(images, band.image_row, v.in), example, maps, plane, inputs);
      convert<true>(rows_of(grads, band.output_row, v.out), example, met, outputs.plane(), of_output);
      for (int64_t panel = 0; panel < index.panels(); ++panel) {
        const int32_t* const cut = matrix.cut + 2 * panel * phases * index.channels;
        const T* const rows_of_panel = met + panel * index.panel * outputs.plane();
        for (int phase = 0; phase < phases; ++phase) {
          if (!inputs.used[phase]) {
            continue;
          }
          const int64_t pv = phase / h.stride, ph = phase % h.stride;
          with_tile<kMostFused>(tile.rows, tile.columns, [&](auto rows, auto columns) {
            for (int64_t row = v.first(pv); row < v.end(pv); row += rows()) {
              for (int64_t column = h.first(ph); column < h.end(ph); column += columns()) {
                const int64_t at = row * map.row() + column * lanes;
                const auto run = [&](auto fused) {
                  differentiate<rows(), columns(), fused()>(
                      matrix, cut, rows_of_panel + row * outputs.row() + column * lanes, outputs.row(), maps + at,
                      plane, map.row(), fused() ? out + at : nullptr, panel == 0, phase * index.channels,
                      (phase + 1) * index.channels);
                };
                out ? run(std::true_type()) : run(std::false_type());
              }
            }
          });
        }
      }
      if (out) {
        convert<false>(rows_of(result, band.image_row, v.in), example, out, plane, inputs);
      }
    }
  });
}

template <typename F>
void with_type(const Tensor& tensor, const F& function) {
  tensor.scalar_type() == at::kDouble ? function(double()) : function(float());
}

Geometry geometry_of(const Tensor& images, at::IntArrayRef numbers) {
  TORCH_CHECK(numbers.size() == 10, "expected ten numbers of a convolution's geometry");
  return {
      {images.size(2), numbers[8], numbers[0], numbers[2], numbers[4], numbers[6]},
      {images.size(3), numbers[9], numbers[1], numbers[3], numbers[5], numbers[7]}};
}

void check(const Index& index, const Geometry& geometry, const Tensor& values, const Tensor& images) {
  TORCH_CHECK(
      images.size(1) == index.channels && geometry.taps() == index.taps && values.numel() >= index.updated &&
          values.scalar_type() == images.scalar_type(),
      "the index, values and images of a packed convolution do not fit");
}

Tensor convolution(
    const Tensor& values, Tensors index_tensors, at::IntArrayRef sizes, const Tensor& images,
    const std::optional<Tensor>& bias, at::IntArrayRef numbers, bool channels_last) {
  const Index index = index_of(sizes, index_tensors);
  const Geometry whole = geometry_of(images, numbers);
  check(index, whole, values, images);
  const Tensor result = at::empty(
      {images.size(0), index.rows, whole.vertical.out, whole.horizontal.out}, images.options(),
      channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
  if (result.numel()) {
    with_type(images, [&](auto zero) {
      using T = decltype(zero);
      Geometry geometry = whole;
      Images<T> inputs = images_of<T>(images), outputs = images_of<T>(result);
      shorten_rows(geometry, {&inputs, &outputs});
      convolve<T>(
          index, geometry, values.const_data_ptr<T>(), bias ? bias->const_data_ptr<T>() : nullptr, inputs, outputs);
    });
  }
  return result;
}

std::tuple<Tensor, Tensor> convolution_gradients(
    const Tensor& values, Tensors index_tensors, at::IntArrayRef sizes, const Tensor& images, const Tensor& grads,
    at::IntArrayRef numbers, bool of_input, bool of_values) {
  const Index index = index_of(sizes, index_tensors);
  const Geometry whole = geometry_of(images, numbers);
  check(index, whole, values, images);
  TORCH_CHECK(
      grads.size(0) == images.size(0) && grads.size(1) == index.rows && grads.size(2) == whole.vertical.out &&
          grads.size(3) == whole.horizontal.out && grads.scalar_type() == images.scalar_type(),
      "the gradient of a packed convolution's output has the wrong shape");
  const Tensor input_grad = of_input ? at::empty_like(images) : at::empty({0}, images.options());
  const Tensor values_grad = of_values ? at::zeros({values.numel()}, values.options()) : at::empty({0}, values.options());
  if (images.numel()) {
    with_type(images, [&](auto zero) {
      using T = decltype(zero);
      Geometry geometry = whole;
      Images<T> inputs = images_of<T>(images), outputs = images_of<T>(grads), result{};
      if (of_input) {
        result = images_of<T>(input_grad);
        shorten_rows(geometry, {&inputs, &outputs, &result});
      } else {
        shorten_rows(geometry, {&inputs, &outputs});
      }
      convolve_back<T>(
          index, geometry, values.const_data_ptr<T>(), inputs, outputs, result,
          of_values ? values_grad.mutable_data_ptr<T>() : nullptr);
    });
  }
  return {input_grad, values_grad};
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

TORCH_LIBRARY_IMPL(topkast, CPU, m) {
  m.impl("conv", convolution);
  m.impl("conv_gradients", convolution_gradients);
  m.impl("conv_index", make_index);
  m.impl("conv_flat_indices", flat_indices);
}
