// The products of a sparse matrix for CPUs. Dense operands are (features, batch), taken in tiles of a few vectors of
// examples: rows of a tile lie without gaps, so that they spread over the whole cache.

#include <ATen/ops/empty_strided.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "../entries.h"

namespace {

constexpr int64_t kRows = 512; // whose sums stay in the L2 cache while blocks of columns are added
constexpr int64_t kGrain = 1 << 15; // smallest number of multiply-adds per thread

// The tiles of a batch, all of the same number of vectors; what is beyond the batch is zero.
template <typename T, int Most>
struct Tiles {
  int64_t batch, count, width;
  int vectors;
  explicit Tiles(int64_t examples) : batch(examples) {
    const int64_t all = (batch + kLanes<T> - 1) / kLanes<T>;
    count = (all + Most - 1) / Most;
    vectors = static_cast<int>((all + count - 1) / count);
    width = vectors * kLanes<T>;
  }
  bool in_place() const { return batch == width; }

  // Calls `copy(row of the operand, row of a tile, examples)` for the rows of all tiles.
  template <typename U, typename V, typename F>
  void for_rows(U* dense, V* tiles, int64_t features, const F& copy) const {
    at::parallel_for(0, features, std::max<int64_t>(kGrain / batch, 1), [&](int64_t begin, int64_t end) {
      for (int64_t feature = begin; feature < end; ++feature) {
        for (int64_t tile = 0; tile < count; ++tile) {
          const int64_t first = std::min(tile * width, batch);
          copy(dense + feature * batch + first, tiles + (tile * features + feature) * width,
               std::min(width, batch - first));
        }
      }
    });
  }

  // Returns an operand in tiles: (tiles, features, width).
  const T* of(const T* dense, int64_t features, Use use) const {
    if (in_place()) {
      return dense;
    }
    T* const tiles = scratch<T>(use, features * count * width);
    for_rows(dense, tiles, features, [&](const T* from, T* to, int64_t examples) {
      std::fill(std::copy_n(from, examples, to), to + width, T(0));
    });
    return tiles;
  }

  // Returns where to write a result, which `finish` copies.
  T* begin(T* dense, int64_t features, Use use) const {
    return in_place() ? dense : scratch<T>(use, features * count * width);
  }
  void finish(T* dense, const T* tiles, int64_t features) const {
    if (!in_place()) {
      for_rows(dense, tiles, features, [](T* to, const T* from, int64_t examples) { std::copy_n(from, examples, to); });
    }
  }

  // Calls `function` with the number of vectors as a constant.
  template <typename F, int... I>
  void with_vectors(const F& function, std::integer_sequence<int, I...>) const {
    ((vectors == I + 1 ? function(std::integral_constant<int, I + 1>()) : void()), ...);
  }
  template <typename F>
  void with_vectors(const F& function) const {
    with_vectors(function, std::make_integer_sequence<int, Most>());
  }
};

// `dense` is (channels, batch), `out` is (rows, batch); A's values are in the order of the product.
template <typename T>
void multiply_matrix(const Index& index, const T* values, const T* dense, int64_t batch, const T* bias, T* out) {
  const Tiles<T, kMost> tiles(batch);
  const T* const inputs = tiles.of(dense, index.channels, kInputs);
  T* const outputs = tiles.begin(out, index.rows, kOutputs);
  const int64_t grain = kGrain * index.rows / (index.active * batch + 1) + 1;
  tiles.with_vectors([&](auto vectors) {
    constexpr int width = vectors() * kLanes<T>;
    at::parallel_for(0, index.rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; row += kRows) {
        const int64_t rows = std::min(kRows, end - row), blocks = index.blocks();
        const Forward<T, TileRows<width>> matrix{
            index.forward_cut + row, {index.forward_keys}, values, rows, blocks, index.rows};
        for (int64_t tile = 0; tile < tiles.count; ++tile) {
          for (int64_t block = 0; block < blocks; ++block) {
            multiply<1, vectors()>(
                matrix, block, inputs + (tile * index.channels + block * index.block) * width, 0,
                bias ? bias + row : nullptr, outputs + (tile * index.rows + row) * width, width, 0);
          }
        }
      }
    });
  });
  tiles.finish(out, outputs, index.rows);
}

// Computes the gradients from `inputs` (channels, batch) and `grads` (rows, batch). The results may be null.
template <typename T>
void differentiate_matrix(
    const Index& index, const T* values, const T* inputs, const T* grads, int64_t batch, T* input_grad, T* values_grad) {
  const Tiles<T, kMostFused> tiles(batch);
  const int64_t channels = index.channels, panels = index.panels();
  const T* const own = tiles.of(inputs, channels, kInputs);
  const T* const met = tiles.of(grads, index.rows, kOutputs);
  T* const out = input_grad ? tiles.begin(input_grad, channels, kInputGrads) : nullptr;
  const int64_t grain = kGrain * channels / (index.updated * batch + 1) + 1;
  tiles.with_vectors([&](auto vectors) {
    constexpr int width = vectors() * kLanes<T>;
    at::parallel_for(0, channels, grain, [&](int64_t first, int64_t last) {
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int32_t* const cut = index.backward_cut + 2 * panel * channels;
        const int32_t begin = cut[2 * first], end = cut[2 * last], whole = begin & ~(kLanes<T> - 1);
        const int64_t length = end - whole + kLanes<T>;
        T *const sums = scratch<T>(kSums, length), *const ordered = scratch<T>(kValues, length);
        std::fill_n(sums, length, T(0));
        const Backward<T, TileRows<width>> matrix{index.backward_cut, {index.backward_keys}, ordered - whole, sums - whole};
        for (int64_t channel = first; out && channel < last; ++channel) {
          for (int32_t entry = cut[2 * channel]; entry < cut[2 * channel + 1]; ++entry) {
            ordered[entry - whole] = values[index.backward_order[entry]];
          }
        }
        for (int64_t tile = 0; tile < tiles.count; ++tile) {
          const int64_t at = tile * channels * width;
          const auto run = [&](auto fused) {
            differentiate<1, vectors(), fused()>(
                matrix, cut, met + (tile * index.rows + panel * index.panel) * width, 0, own + at, width, 0,
                fused() ? out + at : nullptr, panel == 0, first, last);
          };
          out ? run(std::true_type()) : run(std::false_type());
        }
        for (int32_t entry = begin; values_grad && entry < end; ++entry) {
          values_grad[index.backward_order[entry]] = sums[entry - whole];
        }
      }
    });
  });
  if (out) {
    tiles.finish(input_grad, out, channels);
  }
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

template <typename F>
void with_type(const Tensor& tensor, const F& function) {
  tensor.scalar_type() == at::kDouble ? function(double()) : function(float());
}

Tensor product(
    const Tensor& values, Tensors index_tensors, at::IntArrayRef sizes, const Tensor& dense,
    const std::optional<Tensor>& bias, at::IntArrayRef lead) {
  const Index index = index_of(sizes, index_tensors);
  const Tensor result = batch_last(dense, lead, index.rows);
  if (result.numel()) {
    const Tensor ordered = index.forward_order ? values.index_select(0, index_tensors[5]) : values;
    with_type(dense, [&](auto zero) {
      using T = decltype(zero);
      multiply_matrix<T>(
          index, ordered.const_data_ptr<T>(), dense.const_data_ptr<T>(), dense.size(1),
          bias ? bias->const_data_ptr<T>() : nullptr, result.mutable_data_ptr<T>());
    });
  }
  return result;
}

std::tuple<Tensor, Tensor> gradients(
    const Tensor& values, Tensors index_tensors, at::IntArrayRef sizes, const Tensor& inputs, const Tensor& grads,
    at::IntArrayRef lead, bool of_input, bool of_values) {
  const Index index = index_of(sizes, index_tensors);
  const Tensor input_grad = of_input ? batch_last(inputs, lead, index.channels) : at::empty({0}, inputs.options());
  const Tensor values_grad = at::empty({of_values ? values.numel() : 0}, values.options());
  if (of_values) {
    const int64_t known = inputs.size(1) ? index.updated : 0;
    values_grad.narrow(0, known, values.numel() - known).zero_();
  }
  if (inputs.size(1)) {
    with_type(inputs, [&](auto zero) {
      using T = decltype(zero);
      differentiate_matrix<T>(
          index, values.const_data_ptr<T>(), inputs.const_data_ptr<T>(), grads.const_data_ptr<T>(), inputs.size(1),
          of_input ? input_grad.mutable_data_ptr<T>() : nullptr, of_values ? values_grad.mutable_data_ptr<T>() : nullptr);
    });
  }
  return {input_grad, values_grad};
}

} // namespace

TORCH_LIBRARY_IMPL(topkast, CPU, m) {
  m.impl("compiled_product", product);
  m.impl("compiled_gradients", gradients);
}
