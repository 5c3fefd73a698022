// The sparse products for CPUs. Dense operands are (features, batch): each sparse entry is multiplied by whole rows,
// which vectorise for every pattern.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

using at::Tensor;
using at::vec::Vectorized;

// Vectors per batch tile; this many accumulators stay in registers over all entries of a row.
constexpr int kVectors = 8;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kFusedVectors = 8;
#else
constexpr int kFusedVectors = 4; // the fused kernel keeps two of each, and there are 16 registers
#endif
constexpr int64_t kTileBytes = 1 << 20; // size of a dense operand's tile that fits a typical L2 cache
constexpr int kAhead = 24; // entries between the prefetch of a scattered value and its use
constexpr int64_t kGrain = 1 << 15; // smallest number of multiply-adds per thread

struct Pattern {
  const int32_t* crow;
  const int32_t* col;
};

// The part of the batch that the kernels process at a time: `vectors` vectors, of which the last ends at the end of the
// tile and so overlaps the previous one.
struct Tile {
  int64_t start, width;
  int vectors;
};

// Returns the tiles of a batch of at least one vector, with at most `most` vectors per tile.
template <typename T>
std::vector<Tile> tiles_of(int64_t batch, int64_t most) {
  constexpr int64_t lanes = Vectorized<T>::size();
  const int64_t vectors = (batch + lanes - 1) / lanes;
  const int64_t count = (vectors + most - 1) / most;
  std::vector<Tile> tiles;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t first = vectors * i / count, last = vectors * (i + 1) / count;
    tiles.push_back({first * lanes, std::min(last * lanes, batch) - first * lanes, static_cast<int>(last - first)});
  }
  return tiles;
}

// Returns how many vectors a tile may have to fit the cache, for an operand with this many features.
template <typename T>
int64_t cached_vectors(int64_t features) {
  const int64_t bytes = features * Vectorized<T>::size() * sizeof(T) * kVectors;
  return bytes <= kTileBytes ? kVectors : kVectors / 2; // narrower tiles lose more than the cache gains
}

template <typename F, int... K>
void with_vectors(int vectors, F&& function, std::integer_sequence<int, K...>) {
  ((vectors == K + 1 ? function(std::integral_constant<int, K + 1>()) : void()), ...);
}

template <typename F>
void with_vectors(int vectors, F&& function) {
  with_vectors(vectors, function, std::make_integer_sequence<int, kVectors>());
}

template <int K, typename T>
inline int64_t offset(int64_t width, int vector) {
  return vector == K - 1 ? width - Vectorized<T>::size() : vector * Vectorized<T>::size();
}

// Runs `function(first_row, last_row)` on several threads, with about the same number of entries per thread.
template <typename F>
void parallel_rows(const int32_t* crow, int64_t rows, int64_t batch, const F& function) {
  const auto row_of = [&](int64_t work) { // the work of a row is its number of entries plus one
    int64_t low = 0, high = rows;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      crow[middle] + middle < work ? low = middle + 1 : high = middle;
    }
    return low;
  };
  at::parallel_for(0, crow[rows] + rows, std::max<int64_t>(kGrain / batch, 1), [&](int64_t begin, int64_t end) {
    function(row_of(begin), row_of(end));
  });
}

// Computes the product for a tile: `dense` is (columns, width) and contiguous, `out` has rows of `stride`.
template <int K, bool Ordered, typename T>
void product_rows(
    const T* values, Pattern pattern, const int32_t* order, const T* dense, int64_t width, const T* bias, T* out,
    int64_t stride, int64_t first_row, int64_t last_row) {
  using Vec = Vectorized<T>;
  for (int64_t row = first_row; row < last_row; ++row) {
    Vec sums[K];
#pragma GCC unroll 8
    for (int i = 0; i < K; ++i) {
      sums[i] = Vec(bias ? bias[row] : T(0));
    }
    const int32_t end = pattern.crow[row + 1];
    for (int32_t entry = pattern.crow[row]; entry < end; ++entry) {
      const T* meets = dense + pattern.col[entry] * width;
      if (Ordered && entry + kAhead < pattern.crow[last_row]) {
        __builtin_prefetch(values + order[entry + kAhead]);
      }
      const Vec value(values[Ordered ? order[entry] : entry]);
#pragma GCC unroll 8
      for (int i = 0; i < K; ++i) {
        sums[i] = at::vec::fmadd(value, Vec::loadu(meets + offset<K, T>(width, i)), sums[i]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < K; ++i) {
      sums[i].store(out + row * stride + offset<K, T>(width, i));
    }
  }
}

// Returns the sums over the lanes of each vector, as the lanes of one vector.
template <typename T>
inline Vectorized<T> lane_sums(Vectorized<T>* vectors) {
#pragma GCC unroll 16
  for (int count = Vectorized<T>::size(); count > 1; count /= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < count / 2; ++i) {
      const auto [even, odd] = at::vec::deinterleave2(vectors[2 * i], vectors[2 * i + 1]);
      vectors[i] = even + odd;
    }
  }
  return vectors[0];
}

// Computes, for a tile, the products of row r of `own` with the rows of `other` in row r of the pattern. With
// `Fused`, row r of `out` is also the sum of these rows, weighted by the values. `other` is (columns, width) and
// contiguous, `own` and `out` have rows of `stride`.
template <int K, bool Fused, bool Ordered, typename T>
void sampled_rows(
    const T* own, const T* other, int64_t width, Pattern pattern, const int32_t* order, const T* values, T* sampled,
    bool add, T* out, int64_t stride, int64_t first_row, int64_t last_row) {
  using Vec = Vectorized<T>;
  constexpr int lanes = Vec::size();
  const int64_t overlap = K * lanes - width;
  for (int64_t row = first_row; row < last_row; ++row) {
    Vec vectors[K], sums[K];
#pragma GCC unroll 8
    for (int i = 0; i < K; ++i) {
      vectors[i] = Vec::loadu(own + row * stride + offset<K, T>(width, i));
      sums[i] = Vec(T(0));
    }
    if (overlap) { // elements that are in two vectors count once
      T last[lanes];
      vectors[K - 1].store(last);
      std::fill_n(last, overlap, T(0));
      vectors[K - 1] = Vec::loadu(last);
    }
    const int32_t end = pattern.crow[row + 1];
    for (int32_t entry = pattern.crow[row]; entry < end; entry += lanes) {
      const int count = std::min<int32_t>(end - entry, lanes);
      Vec products[lanes];
      for (int lane = 0; lane < count; ++lane) {
        const T* meets = other + pattern.col[entry + lane] * width;
        if (Ordered && entry + lane + kAhead < pattern.crow[last_row]) {
          const int32_t ahead = order[entry + lane + kAhead];
          __builtin_prefetch(values + ahead);
          __builtin_prefetch(sampled + ahead, 1);
        }
        Vec value(T(0));
        if (Fused) {
          value = Vec(values[Ordered ? order[entry + lane] : entry + lane]);
        }
        Vec even(T(0)), odd(T(0));
#pragma GCC unroll 8
        for (int i = 0; i < K; ++i) {
          const Vec met = Vec::loadu(meets + offset<K, T>(width, i));
          Vec& product = i % 2 ? odd : even;
          product = at::vec::fmadd(vectors[i], met, product);
          if (Fused) {
            sums[i] = at::vec::fmadd(value, met, sums[i]);
          }
        }
        products[lane] = even + odd;
      }
      const Vec result = lane_sums<T>(products);
      if (Ordered) {
        T scattered[lanes];
        result.store(scattered);
        for (int lane = 0; lane < count; ++lane) {
          T& target = sampled[order[entry + lane]];
          target = add ? target + scattered[lane] : scattered[lane];
        }
      } else {
        T* target = sampled + entry;
        (add ? result + Vec::loadu(target, count) : result).store(target, count);
      }
    }
    if (Fused) {
#pragma GCC unroll 8
      for (int i = 0; i < K; ++i) {
        sums[i].store(out + row * stride + offset<K, T>(width, i));
      }
    }
  }
}

// Returns a tile of a dense operand, contiguous so that its rows spread over the whole cache.
Tensor tile_of(const Tensor& dense, const Tile& tile) {
  return dense.narrow(1, tile.start, tile.width).contiguous();
}

// `dense` is (columns, batch), `out` is (rows, batch), and the batch is at least one vector.
template <typename T>
void product(
    const T* values, Pattern pattern, const int32_t* order, int64_t rows, const Tensor& dense, const T* bias, T* out) {
  const int64_t batch = dense.size(1);
  for (const Tile& tile : tiles_of<T>(batch, cached_vectors<T>(dense.size(0)))) {
    const Tensor part = tile_of(dense, tile);
    const T* meets = part.const_data_ptr<T>();
    parallel_rows(pattern.crow, rows, tile.width, [&](int64_t first_row, int64_t last_row) {
      with_vectors(tile.vectors, [&](auto vectors) {
        const auto run = [&](auto ordered) {
          product_rows<vectors(), ordered()>(
              values, pattern, order, meets, tile.width, bias, out + tile.start, batch, first_row, last_row);
        };
        order ? run(std::true_type()) : run(std::false_type());
      });
    });
  }
}

// `own` is (rows, batch), `other` is (columns, batch), and the batch is at least one vector; see `sampled_rows`.
template <bool Fused, typename T>
void sampled(
    const Tensor& own, const Tensor& other, Pattern pattern, const int32_t* order, const T* values, T* result,
    T* out) {
  const int64_t rows = own.size(0), batch = own.size(1);
  for (const Tile& tile : tiles_of<T>(batch, Fused ? kFusedVectors : cached_vectors<T>(other.size(0)))) {
    const Tensor part = tile_of(other, tile);
    const T *owns = own.const_data_ptr<T>() + tile.start, *meets = part.const_data_ptr<T>();
    parallel_rows(pattern.crow, rows, tile.width, [&](int64_t first_row, int64_t last_row) {
      with_vectors(tile.vectors, [&](auto vectors) {
        const auto run = [&](auto ordered) {
          sampled_rows<vectors(), Fused, ordered()>(
              owns, meets, tile.width, pattern, order, values, result, tile.start > 0, out + tile.start, batch,
              first_row, last_row);
        };
        order ? run(std::true_type()) : run(std::false_type());
      });
    });
  }
}

// Returns a dense operand that is at least one vector wide; added columns are zero.
template <typename T>
Tensor widened(const Tensor& dense) {
  constexpr int64_t width = Vectorized<T>::size();
  if (dense.size(1) >= width) {
    return dense;
  }
  Tensor wide = at::zeros({dense.size(0), width}, dense.options());
  wide.narrow(1, 0, dense.size(1)).copy_(dense);
  return wide;
}

// Runs `function(out)` for `out` with `batch` columns, or with those of one vector if there are more.
template <typename T, typename F>
void with_wide(const Tensor& result, int64_t rows, int64_t batch, const F& function) {
  constexpr int64_t width = Vectorized<T>::size();
  if (batch >= width) {
    return function(result.mutable_data_ptr<T>());
  }
  const Tensor out = at::empty({rows, width}, result.options());
  function(out.mutable_data_ptr<T>());
  result.as_strided({rows, batch}, {batch, 1}).copy_(out.narrow(1, 0, batch));
}

// Returns an uninitialised tensor (*lead, features) with the batch last in memory; not a view.
Tensor batch_last(const Tensor& like, at::IntArrayRef lead, int64_t features) {
  std::vector<int64_t> sizes(lead.begin(), lead.end()), strides(lead.size() + 1);
  int64_t batch = 1;
  for (int64_t dim = static_cast<int64_t>(lead.size()) - 1; dim >= 0; batch *= lead[dim--]) {
    strides[dim] = batch;
  }
  sizes.push_back(features);
  strides.back() = batch;
  return at::empty_strided(sizes, strides, like.options());
}

Pattern pattern_of(const Tensor& crow, const Tensor& col) {
  return {crow.const_data_ptr<int32_t>(), col.const_data_ptr<int32_t>()};
}

template <typename F>
void with_type(const Tensor& tensor, const F& function) {
  tensor.scalar_type() == at::kDouble ? function(double()) : function(float());
}

Tensor product_op(
    const Tensor& values, const Tensor& crow, const Tensor& col, const std::optional<Tensor>& order,
    const Tensor& dense, const std::optional<Tensor>& bias, at::IntArrayRef lead) {
  const int64_t rows = crow.numel() - 1, batch = dense.size(1);
  const Tensor result = batch_last(dense, lead, rows);
  if (result.numel() == 0) {
    return result;
  }
  with_type(dense, [&](auto zero) {
    using T = decltype(zero);
    with_wide<T>(result, rows, batch, [&](T* out) {
      product<T>(
          values.const_data_ptr<T>(), pattern_of(crow, col), order ? order->const_data_ptr<int32_t>() : nullptr, rows,
          widened<T>(dense), bias ? bias->const_data_ptr<T>() : nullptr, out);
    });
  });
  return result;
}

std::tuple<Tensor, Tensor> gradients_op(
    const Tensor& values, const Tensor& crow, const Tensor& col, const Tensor& t_crow, const Tensor& t_col,
    const Tensor& t_order, const Tensor& crow2, const Tensor& col2, const Tensor& inputs, const Tensor& grads,
    at::IntArrayRef lead, bool transposed, bool of_input, bool of_values) {
  const int64_t batch = inputs.size(1), first = col.numel(), both = first + col2.numel();
  // A with the layer's inputs as rows
  const Tensor &by_crow = transposed ? crow : t_crow, &by_col = transposed ? col : t_col;
  const auto order = transposed ? std::optional<Tensor>() : t_order;
  if (!of_values || batch == 0) {
    return {
        of_input ? product_op(values, by_crow, by_col, order, grads, std::nullopt, lead) : at::empty({0}, inputs.options()),
        of_values ? at::zeros({values.numel()}, values.options()) : at::empty({0}, values.options())};
  }
  const Tensor input_grad = of_input ? batch_last(inputs, lead, inputs.size(0)) : at::empty({0}, inputs.options());
  const Tensor values_grad = at::empty({values.numel()}, values.options());
  values_grad.narrow(0, both, values.numel() - both).zero_();
  with_type(inputs, [&](auto zero) {
    using T = decltype(zero);
    const Tensor input = widened<T>(inputs), grad = widened<T>(grads);
    const Tensor &own = transposed ? input : grad, &other = transposed ? grad : input;
    T* const out = values_grad.mutable_data_ptr<T>();
    sampled<false, T>(own, other, pattern_of(crow2, col2), nullptr, nullptr, out + first, nullptr);
    if (!of_input) {
      sampled<false, T>(own, other, pattern_of(crow, col), nullptr, nullptr, out, nullptr);
      return;
    }
    // each row of the output's gradient is read once for both results
    with_wide<T>(input_grad, inputs.size(0), batch, [&](T* input_out) {
      sampled<true, T>(
          input, grad, pattern_of(by_crow, by_col), order ? order->const_data_ptr<int32_t>() : nullptr,
          values.const_data_ptr<T>(), out, input_out);
    });
  });
  return {input_grad, values_grad};
}

} // namespace

TORCH_LIBRARY_IMPL(topkast, CPU, m) {
  m.impl("compiled_product", product_op);
  m.impl("compiled_gradients", gradients_op);
}
