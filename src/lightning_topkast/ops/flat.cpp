// Passes over the flat entries of a weight, for CPUs; each does exactly what the Python code beside its call in flat.py
// does. Without PyTorch's headers this compiles in a second. No product is added to anything, so that no compiler can
// fuse the two and round otherwise.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace {

constexpr int64_t kBlock = 2048; // entries processed at a time, so that temporaries stay in the L1 cache
constexpr int64_t kGrain = 1 << 15; // smallest number of entries per thread

// Runs `function(begin, end)` on several threads. The results do not depend on the number of threads.
template <typename F>
void parallel(int64_t size, int64_t threads, const F& function) {
  const int64_t parts = std::max<int64_t>(1, std::min(threads, size / kGrain));
#ifdef _OPENMP
  if (parts > 1) {
#pragma omp parallel for num_threads(parts) schedule(static, 1)
    for (int64_t part = 0; part < parts; ++part) {
      function(size / parts * part, part + 1 == parts ? size : size / parts * (part + 1));
    }
    return;
  }
#endif
  function(int64_t(0), size);
}

template <typename T>
void mask(T* values, const int8_t* members, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    values[i] &= static_cast<T>(members[i]);
  }
}

// Returns the value, or 0 if its member is 0.
inline float kept(float value, int8_t member) {
  int32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits &= member;
  std::memcpy(&value, &bits, sizeof bits);
  return value;
}

constexpr int64_t kPart = 256; // the same for a step, which has a block of each of several tensors; measured
constexpr int64_t kAccurate = 0x140102; // MKL's mode: best accuracy, denormals kept, errors ignored, as PyTorch calls it

using Root = void (*)(int32_t count, const float* values, float* roots, int64_t mode);

// A masked weight around the optimizer's step.
struct Masked {
  float* values; // which are 0 between steps at the places and where the member is 0
  const int8_t* members;
  int64_t size;
  const int64_t* places; // of the exploring entries, sorted
  float* explored;
  int64_t count;
  const double* factors; // of the explored values and of the others

  // Calls `inside(start, length, first, last)` for each block, whose places have the indices first to last; then takes the
  // values there out, times a factor, and leaves 0 there and where the member is 0; the others get another factor.
  template <typename F>
  void close(int64_t threads, const F& inside) const {
    const float of_explored = static_cast<float>(factors[0]), of_others = static_cast<float>(factors[1]);
    const Masked weight = *this; // nothing that is written can change it
    parallel(size, threads, [=](int64_t begin, int64_t end) {
      int64_t first = std::lower_bound(weight.places, weight.places + weight.count, begin) - weight.places;
      for (int64_t start = begin; start < end; start += kPart) {
        const int64_t stop = std::min(start + kPart, end);
        const int64_t* const most = weight.places + std::min(first + stop - start, weight.count);
        const int64_t last = std::lower_bound(weight.places + first, most, stop) - weight.places;
        inside(start, stop - start, first, last);
        for (; first < last; ++first) {
          weight.explored[first] = weight.values[weight.places[first]] * of_explored;
          weight.values[weight.places[first]] = 0;
        }
        if (of_others == 1) { // nothing else, not even what a product does to denormals
          for (int64_t i = start; i < stop; ++i) {
            weight.values[i] = kept(weight.values[i], weight.members[i]);
          }
        } else {
          for (int64_t i = start; i < stop; ++i) {
            weight.values[i] = kept(weight.values[i], weight.members[i]) * of_others;
          }
        }
      }
    });
  }

  // For each block masks the gradient if `masks`, puts the explored values in, calls `update(start, length)` and closes.
  template <typename F>
  void step(float* gradient, bool masks, int64_t threads, const F& update) const {
    const Masked weight = *this;
    close(threads, [=](int64_t start, int64_t length, int64_t first, int64_t last) {
      if (masks) {
        mask(reinterpret_cast<uint32_t*>(gradient), weight.members, start, start + length);
      }
      for (int64_t k = first; k < last; ++k) {
        weight.values[weight.places[k]] = weight.explored[k];
      }
      update(start, length);
    });
  }
};

// Updates up to `kPart` values and their momentum, of which there may be none (null), as `torch.optim.SGD` does. `options`
// are the weight decay, the momentum, 1 - dampening, -lr and whether the momentum is Nesterov's. Here and below each sum
// with a product is an explicit `fma` where PyTorch has one, so that no compiler decides.
void update_sgd(
    float* __restrict values, const float* __restrict gradient, float* __restrict momentum, int64_t length,
    const double* options) {
  const float decay = options[0], old_share = options[1], new_share = options[2], rate = options[3];
  float change[kPart];
  for (int64_t i = 0; i < length; ++i) {
    change[i] = decay == 0 ? gradient[i] : std::fma(values[i], decay, gradient[i]);
  }
  if (momentum != nullptr) {
    const bool nesterov = options[4] != 0;
    for (int64_t i = 0; i < length; ++i) {
      const float known = momentum[i] * old_share;
      momentum[i] = std::fma(change[i], new_share, known);
      change[i] = nesterov ? std::fma(momentum[i], old_share, change[i]) : momentum[i];
    }
  }
  for (int64_t i = 0; i < length; ++i) {
    values[i] = std::fma(change[i], rate, values[i]);
  }
}

// Updates up to `kPart` values and their moments as `torch.optim.Adam` and `AdamW` do. `options` are AdamW's factor of the
// values, Adam's weight decay, 1 - β1, β2, 1 - β2, the root of the second bias correction, ε and minus the step size.
// `root_of` writes MKL's square roots, whose rounding PyTorch's unfused optimizers have; null: the processor's.
void update_adam(
    float* __restrict values, const float* __restrict gradient, float* __restrict average, float* __restrict squares,
    int64_t length, const double* options, Root root_of) {
  const float factor = options[0], decay = options[1], weight1 = options[2], beta2 = options[3], weight2 = options[4];
  const float correction = options[5], epsilon = options[6], rate = options[7];
  const auto moments = [&](int64_t i) {
    const float change = decay == 0 ? gradient[i] : std::fma(values[i], decay, gradient[i]);
    const float difference = change - average[i];
    average[i] = weight1 < 0.5f ? std::fma(weight1, difference, average[i]) : std::fma(weight1 - 1, difference, change);
    const float known = squares[i] * beta2;
    return squares[i] = std::fma(weight2 * change, change, known);
  };
  const auto move = [&](int64_t i, float root) {
    const float decayed = std::fma(values[i], factor, -0.0f); // a product that is rounded before anything is added
    values[i] = decayed + rate * average[i] / (root / correction + epsilon);
  };
  if (root_of == nullptr) {
    for (int64_t i = 0; i < length; ++i) {
      move(i, std::sqrt(moments(i)));
    }
    return;
  }
  float roots[kPart];
  for (int64_t i = 0; i < length; ++i) {
    const float square = moments(i);
    roots[i] = square == 0 ? 1 : square; // a zero takes MKL seven times as long as other numbers
  }
  root_of(static_cast<int32_t>(length), roots, roots, kAccurate);
  for (int64_t i = 0; i < length; ++i) {
    move(i, squares[i] == 0 ? 0 : roots[i]);
  }
}

// One of the sorted runs of `places`, which is read block by block.
struct Run {
  const int64_t* places;
  int64_t next, end;

  // Calls `function(place - start, index)` for the places before start + `kBlock`.
  template <typename F>
  void block(int64_t start, const F& function) {
    for (; next < end && places[next] < start + kBlock; ++next) {
      function(places[next] - start, next);
    }
  }
};

// Calls `function(place, k)` for all places; `values` are what it reads or writes there. From index `split` on the places
// are a second sorted run, if `split` is not 0: both are passed over together, since they lie in the same cache lines.
template <typename T, typename F>
void at_places(
    const T* values, int64_t size, const int64_t* places, int64_t split, int64_t count, int64_t threads,
    const F& function) {
  constexpr int64_t ahead = 48;
  if (split == 0) {
    parallel(count, threads, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        if (k + ahead < end) {
          __builtin_prefetch(values + places[k + ahead], 1);
        }
        function(places[k], k);
      }
    });
    return;
  }
  parallel(size, threads, [&](int64_t begin, int64_t end) {
    const auto run = [&](int64_t from, int64_t to) {
      const auto index = [&](int64_t place) { return std::lower_bound(places + from, places + to, place) - places; };
      return Run{places, index(begin), index(end)};
    };
    Run runs[] = {run(0, split), run(split, count)};
    for (int64_t start = begin; start < end; start += kBlock) {
      for (Run& each : runs) {
        each.block(start, [&](int64_t place, int64_t k) { function(start + place, k); });
      }
    }
  });
}

// Returns one bit for each of eight bytes that are 0 or 1: the product moves each to its place in the last byte.
inline uint64_t bits_of(const uint8_t* bytes) {
  uint64_t word;
  std::memcpy(&word, bytes, 8);
  if constexpr (std::endian::native == std::endian::big) {
    word = __builtin_bswap64(word);
  }
  return word * 0x0102040810204080 >> 56;
}

// Writes the positions of the bytes that are 1 in a block of zeros and ones, and returns how many there are.
inline int64_t set_bytes(const uint8_t* bytes, int64_t count, int32_t* positions) {
  int64_t members = 0, i = 0;
  const auto add = [&](int64_t start, uint64_t bits) {
    for (; bits != 0; bits &= bits - 1) {
      positions[members++] = static_cast<int32_t>(start + std::countr_zero(bits));
    }
  };
  for (; i + 64 <= count; i += 64) { // one bit for each byte, so that a loop's end is mispredicted once in 64
    uint64_t bits = 0;
    for (int64_t j = 0; j < 8; ++j) {
      bits |= bits_of(bytes + i + 8 * j) << 8 * j;
    }
    add(i, bits);
  }
  for (; i < count; ++i) {
    add(i, bytes[i]);
  }
  return members;
}

// For up to 64 scores, returns whether one is not finite; writes how many brackets each is above and whether it is
// inside any, and adds to how many scores are above each.
inline bool compare(
    const float* scores, int64_t count, int64_t brackets, const float* low, const float* high, uint8_t* sums,
    uint8_t* flags, int64_t* above) {
  int32_t larger[64] = {}, at_least[64] = {}, broken = 0;
  for (int64_t j = 0; j < brackets; ++j) {
    const float least = low[j], most = high[j];
    int32_t total = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int32_t is_above = scores[i] > most;
      larger[i] += is_above;
      total += is_above;
    }
    for (int64_t i = 0; i < count; ++i) {
      at_least[i] += scores[i] >= least;
    }
    above[j] += total;
  }
  for (int64_t i = 0; i < count; ++i) {
    broken |= !(std::abs(scores[i]) <= std::numeric_limits<float>::max());
  }
  for (int64_t i = 0; i < count; ++i) {
    sums[i] = static_cast<uint8_t>(larger[i]);
  }
  for (int64_t i = 0; i < count; ++i) {
    flags[i] = at_least[i] > larger[i];
  }
  return broken;
}

// Calls `function(pointer)` with a pointer to values of this many bytes.
template <typename F>
void with_width(int64_t width, void* values, const F& function) {
  switch (width) {
    case 1:
      return function(static_cast<uint8_t*>(values));
    case 2:
      return function(static_cast<uint16_t*>(values));
    case 4:
      return function(static_cast<uint32_t*>(values));
    case 8:
      return function(static_cast<uint64_t*>(values));
  }
}

// Returns where the second of two sorted runs begins.
int64_t second_run(const int64_t* places, int64_t count) {
  int64_t k = 1;
  while (k < count && places[k - 1] < places[k]) {
    ++k;
  }
  return std::min(k, count);
}

} // namespace

extern "C" {

// Clears all bits of the values whose member is 0; the others, with all bits set, stay. `width` is bytes per value.
void topkast_mask(int64_t width, void* values, const int8_t* members, int64_t size, int64_t threads) {
  with_width(width, values, [&](auto* all) {
    parallel(size, threads, [&](int64_t begin, int64_t end) { mask(all, members, begin, end); });
  });
}

// Writes the entries to the places; for `split` see `at_places`.
void topkast_put(
    int64_t width, void* values, int64_t size, const int64_t* places, int64_t split, int64_t count, void* entries,
    int64_t threads) {
  with_width(width, values, [&](auto* all) {
    const auto* given = static_cast<decltype(all)>(entries);
    at_places(all, size, places, split, count, threads, [&](int64_t place, int64_t k) { all[place] = given[k]; });
  });
}

// Writes one value to all places.
void topkast_fill(
    int64_t width, void* values, const int64_t* places, void* value, int64_t count, int64_t threads) {
  with_width(width, values, [&](auto* all) {
    const auto same = *static_cast<decltype(all)>(value);
    at_places(all, 0, places, 0, count, threads, [&](int64_t place, int64_t) { all[place] = same; });
  });
}

// Reads the entries at the places; for `split` see `at_places`.
void topkast_take(
    int64_t width, void* values, int64_t size, const int64_t* places, int64_t split, int64_t count, void* entries,
    int64_t threads) {
  with_width(width, values, [&](auto* all) {
    auto* const taken = static_cast<decltype(all)>(entries);
    at_places(all, size, places, split, count, threads, [&](int64_t place, int64_t k) { taken[k] = all[place]; });
  });
}

// Takes the values at the sorted `exploring` places out, times a factor, and leaves 0 there and where the member is 0; the
// other values are multiplied by another factor. At last `open` becomes 0.
void topkast_close(
    float* values, const int8_t* members, int64_t size, const int64_t* exploring, float* explored, int64_t count,
    const double* factors, uint8_t* open, int64_t threads) {
  const Masked weight{values, members, size, exploring, explored, count, factors};
  weight.close(threads, [](int64_t, int64_t, int64_t, int64_t) {});
  *open = 0;
}

// Does all of a step of `torch.optim.SGD`: masks the gradient if `masks` is not 0, puts the `explored` values in, updates,
// and closes as `topkast_close` does. `momentum` is null if there is none; for `options` see `update_sgd`.
void topkast_sgd(
    float* values, const int8_t* members, int64_t size, const int64_t* exploring, float* explored, int64_t count,
    const double* factors, float* gradient, int64_t masks, const double* options, float* momentum, int64_t threads) {
  const Masked weight{values, members, size, exploring, explored, count, factors};
  weight.step(gradient, masks != 0, threads, [=](int64_t start, int64_t length) {
    float* const part = momentum == nullptr ? nullptr : momentum + start;
    update_sgd(values + start, gradient + start, part, length, options);
  });
}

// The same for `torch.optim.Adam` and `AdamW`, whose count of steps grows unless it is null; see `update_adam`.
void topkast_adam(
    float* values, const int8_t* members, int64_t size, const int64_t* exploring, float* explored, int64_t count,
    const double* factors, float* gradient, int64_t masks, const double* options, float* average, float* squares,
    float* count_of_steps, Root root, int64_t threads) {
  const Masked weight{values, members, size, exploring, explored, count, factors};
  weight.step(gradient, masks != 0, threads, [=](int64_t start, int64_t length) {
    update_adam(values + start, gradient + start, average + start, squares + start, length, options, root);
  });
  if (count_of_steps != nullptr) {
    *count_of_steps += 1;
  }
}

// Writes |α + latent|, or |explored| at the sorted `exploring` places.
void topkast_magnitudes(
    const float* alpha, const float* latent, const int64_t* exploring, const float* explored, int64_t count,
    float* magnitudes, int64_t size, int64_t threads) {
  parallel(size, threads, [&](int64_t begin, int64_t end) {
    int64_t next = std::lower_bound(exploring, exploring + count, begin) - exploring;
    for (int64_t start = begin; start < end; start += kBlock) {
      const int64_t stop = std::min(start + kBlock, end);
      for (int64_t i = start; i < stop; ++i) {
        magnitudes[i] = std::abs(alpha[i] + latent[i]);
      }
      for (; next < count && exploring[next] < stop; ++next) {
        magnitudes[exploring[next]] = std::abs(explored[next]);
      }
    }
  });
}

// Writes, for each score, how many brackets it is above. The first `capacity` indices of the scores inside bracket j are
// written to `inside` + j · `capacity`, and the scores themselves likewise to `values`; `above` and `found` count those
// above and inside. Returns whether all scores are finite.
int64_t topkast_scan(
    const float* scores, int64_t size, int64_t brackets, const float* low, const float* high, uint8_t* tiers,
    int64_t* inside, float* values, int64_t capacity, int64_t* above, int64_t* found) {
  uint8_t flags[kBlock];
  int32_t positions[kBlock];
  std::fill(above, above + brackets, 0);
  std::fill(found, found + brackets, 0);
  for (int64_t start = 0; start < size; start += kBlock) {
    const int64_t count = std::min(kBlock, size - start);
    const float* const block = scores + start;
    bool broken = false;
    int64_t i = 0;
    for (; i + 64 <= count; i += 64) {
      broken |= compare(block + i, 64, brackets, low, high, tiers + start + i, flags + i, above);
    }
    broken |= compare(block + i, count - i, brackets, low, high, tiers + start + i, flags + i, above);
    if (broken) {
      return 0;
    }
    const int64_t members = set_bytes(flags, count, positions);
    for (int64_t j = 0; j < brackets; ++j) {
      for (int64_t k = 0; k < members; ++k) {
        const float score = block[positions[k]];
        if (found[j] < capacity) {
          inside[j * capacity + found[j]] = start + positions[k];
          values[j * capacity + found[j]] = score;
        }
        found[j] += (score >= low[j]) & (score <= high[j]);
      }
    }
  }
  return 1;
}

// Returns how many bytes have this value.
int64_t topkast_count(const uint8_t* bytes, int64_t size, int64_t value) {
  const uint8_t wanted = static_cast<uint8_t>(value);
  int64_t total = 0;
  for (int64_t start = 0; start < size; start += kBlock) {
    const int64_t count = std::min(kBlock, size - start);
    uint32_t equal = 0;
    for (int64_t i = 0; i < count; ++i) {
      equal += bytes[start + i] == wanted;
    }
    total += equal;
  }
  return total;
}

// Writes the indices of the bytes that have this value, of which there are as many as `topkast_count` returns.
void topkast_find(const uint8_t* bytes, int64_t size, int64_t value, int64_t* places) {
  const uint8_t wanted = static_cast<uint8_t>(value);
  uint8_t equal[kBlock];
  int32_t positions[kBlock];
  for (int64_t start = 0; start < size; start += kBlock) {
    const int64_t count = std::min(kBlock, size - start);
    for (int64_t i = 0; i < count; ++i) {
      equal[i] = bytes[start + i] == wanted;
    }
    const int64_t members = set_bytes(equal, count, positions);
    for (int64_t k = 0; k < members; ++k) {
      places[k] = start + positions[k];
    }
    places += members;
  }
}

// Compares tiers with those before, which `members` and the sorted `exploring` places say; `explored` are the values
// there, those of A are in `alpha`, the others in `latent`. Writes the first `capacity` places at which tiers differ, with
// both tiers, and returns how many there are. Writes the new exploring places, as many as `topkast_count` returns, and
// the values there. Puts values into `latent` at places that explore no longer.
int64_t topkast_changes(
    int64_t width, const int8_t* members, const int64_t* exploring, void* explored, int64_t exploring_count,
    const uint8_t* tiers, int64_t size, void* alpha, void* latent, int64_t* changed, uint8_t* before, uint8_t* after,
    int64_t capacity, int64_t* new_exploring, void* new_explored) {
  int64_t total = 0;
  with_width(width, alpha, [&](auto* of_active) {
    using T = std::remove_pointer_t<decltype(of_active)>;
    const T* const values = static_cast<T*>(explored);
    T *const others = static_cast<T*>(latent), *out = static_cast<T*>(new_explored);
    uint8_t old[kBlock], flags[kBlock];
    int32_t different[kBlock], exploring_now[kBlock];
    T known[kBlock];
    int64_t next = 0;
    for (int64_t start = 0; start < size; start += kBlock) {
      const int64_t count = std::min(kBlock, size - start);
      const uint8_t* const block = tiers + start;
      for (int64_t i = 0; i < count; i += 64) { // the next block
        __builtin_prefetch(members + start + count + i);
        __builtin_prefetch(block + count + i);
      }
      for (int64_t i = 0; i < count; ++i) {
        old[i] = members[start + i] & 2;
      }
      for (; next < exploring_count && exploring[next] < start + count; ++next) {
        old[exploring[next] - start] = 1;
        known[exploring[next] - start] = values[next];
      }
      for (int64_t i = 0; i < count; ++i) {
        flags[i] = old[i] != block[i];
      }
      const int64_t found = set_bytes(flags, count, different);
      for (int64_t k = 0; k < found; ++k) {
        const int32_t i = different[k];
        __builtin_prefetch((old[i] == 2 ? of_active : others) + start + i, 1);
      }
      for (int64_t i = 0; i < count; ++i) { // while these are on their way
        flags[i] = block[i] == 1;
      }
      const int64_t explore = set_bytes(flags, count, exploring_now);
      for (int64_t k = 0; k < found; ++k) {
        const int32_t i = different[k];
        if (old[i] == 1) {
          others[start + i] = known[i];
        } else if (block[i] == 1) {
          known[i] = old[i] ? of_active[start + i] : others[start + i];
        }
        if (total + k < capacity) {
          changed[total + k] = start + i;
          before[total + k] = old[i];
          after[total + k] = block[i];
        }
      }
      total += found;
      for (int64_t k = 0; k < explore; ++k) {
        new_exploring[k] = start + exploring_now[k];
        out[k] = known[exploring_now[k]];
      }
      new_exploring += explore;
      out += explore;
    }
  });
  return total;
}

// For each place of `after`, writes its index in `before`, or -1. Both hold two sorted runs of places below `size`.
void topkast_positions(
    const int64_t* before, int64_t before_count, const int64_t* after, int64_t after_count, int64_t size,
    int64_t* positions) {
  const int64_t split = second_run(before, before_count), after_split = second_run(after, after_count);
  Run known[] = {{before, 0, split}, {before, split, before_count}};
  Run asked[] = {{after, 0, after_split}, {after, after_split, after_count}};
  int64_t block[kBlock];
  for (int64_t start = 0; start < size; start += kBlock) {
    std::fill(block, block + kBlock, -1);
    for (Run& run : known) {
      run.block(start, [&](int64_t place, int64_t k) { block[place] = k; });
    }
    for (Run& run : asked) {
      run.block(start, [&](int64_t place, int64_t k) { positions[k] = block[place]; });
    }
  }
}

// Writes the values at these positions, and `start` where a position is -1.
void topkast_move(
    int64_t width, void* values, const int64_t* positions, const void* start, void* moved, int64_t count,
    int64_t threads) {
  with_width(width, values, [&](auto* all) {
    const auto otherwise = *static_cast<const std::remove_pointer_t<decltype(all)>*>(start);
    auto* const out = static_cast<decltype(all)>(moved);
    parallel(count, threads, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        out[k] = positions[k] < 0 ? otherwise : all[positions[k]];
      }
    });
  });
}

// Splits strictly increasing indices within the matrix into rows and columns: compressed rows (CSR).
void topkast_rows(
    const int64_t* indices, int64_t count, int64_t rows, int64_t columns, int32_t* crow, int32_t* col) {
  int64_t k = 0;
  for (int64_t row = 0; row < rows; ++row) {
    crow[row] = static_cast<int32_t>(k);
    const int64_t start = row * columns;
    for (; k < count && indices[k] < start + columns; ++k) {
      col[k] = static_cast<int32_t>(indices[k] - start);
    }
  }
  crow[rows] = static_cast<int32_t>(k);
}

// Transposes compressed rows, by counting; see `Pattern`.
void topkast_transpose(
    const int32_t* crow, const int32_t* col, int64_t rows, int64_t columns, int32_t* t_crow, int32_t* t_col,
    int32_t* t_order) {
  std::fill(t_crow, t_crow + columns + 1, 0);
  for (int64_t k = 0; k < crow[rows]; ++k) {
    ++t_crow[col[k] + 1];
  }
  for (int64_t column = 0; column < columns; ++column) {
    t_crow[column + 1] += t_crow[column];
  }
  for (int64_t row = 0; row < rows; ++row) {
    for (int32_t k = crow[row]; k < crow[row + 1]; ++k) {
      const int32_t at = t_crow[col[k]]++;
      t_col[at] = static_cast<int32_t>(row);
      t_order[at] = k;
    }
  }
  for (int64_t column = columns; column > 0; --column) { // each is where its column ends, which the next one begins at
    t_crow[column] = t_crow[column - 1];
  }
  t_crow[0] = 0;
}

// Writes the flat indices of compressed rows.
void topkast_flat(const int32_t* crow, const int32_t* col, int64_t rows, int64_t columns, int64_t* indices) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int32_t k = crow[row]; k < crow[row + 1]; ++k) {
      indices[k] = row * columns + col[k];
    }
  }
}

} // extern "C"
