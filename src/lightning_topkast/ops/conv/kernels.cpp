// Convolutions with an unstructured sparse kernel, and their gradients: direct, without an im2col.
//
// Examples are the lanes of vectors: a channel's map holds, for each pixel, one vector of examples. An entry of the kernel
// multiplies the vectors of a tile of pixels, shifted by its place, so that every pattern vectorises; the sums of a tile
// stay in registers. The border of a map is zero, which is the padding. With a stride, the pixels that the same places of
// the kernel meet, a phase, are maps of their own, so that all steps within a map are 1. A few rows of pixels, a band, are
// converted, computed and converted back together, since their maps fit the L2 cache; of these, what the entries of a
// block of channels meet, or of a panel of outputs, fits the L1 cache.

#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "../entries.h"

namespace {

constexpr int64_t kBandBytes = 1 << 19; // of maps that are computed together, which fit a typical L2 cache

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
      index.blocks(), index.rows};
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

} // namespace

TORCH_LIBRARY_IMPL(topkast, CPU, m) {
  m.impl("conv", convolution);
  m.impl("conv_gradients", convolution_gradients);
}
