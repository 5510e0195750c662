// Runs the CPU kernel over small problems of every kind, for a sanitizer to watch: `make sanitize`.
// Arrays are exactly as long as they must be, on the heap; points lie inside, outside and nowhere.
#include "../../ops/csrc/cpu.cpp"

#include <cstdio>
#include <random>
#include <vector>

namespace {

struct Size { std::int64_t batch, heads, channels, queries, per_level; std::vector<std::int64_t> shapes; };

template <class X>
std::vector<X> randoms(std::size_t count, std::mt19937& random, double low, double high) {
  std::uniform_real_distribution<double> number(low, high);
  std::vector<X> out(count);
  for (X& x : out) x = static_cast<X>(number(random));
  return out;
}

template <class A>
bool run(const Size& size, std::int64_t storage, std::int64_t form, std::size_t item) {
  std::mt19937 random(7);
  msda::Problem p{};
  std::int64_t tokens = 0;
  for (std::size_t l = 0; l < size.shapes.size(); l += 2) tokens += size.shapes[l] * size.shapes[l + 1];
  const std::int64_t levels = size.shapes.size() / 2;
  const std::size_t rows = size.batch * size.queries * size.heads;
  const std::size_t samples = rows * levels * size.per_level;
  const std::size_t values = size.batch * tokens * size.heads * size.channels;
  std::vector<char> value(values * item), grad_value(values * item);
  std::vector<char> output(rows * size.channels * item), grad_output(rows * size.channels * item);
  for (char& c : value) c = static_cast<char>(random() & 0x3b);  // no infinity in any type
  for (char& c : grad_output) c = static_cast<char>(random() & 0x3b);
  auto points = randoms<A>(2 * samples, random, -0.5, 1.5);
  points[0] = std::numeric_limits<A>::quiet_NaN();
  points[samples] = std::numeric_limits<A>::infinity();
  auto weights = randoms<A>(samples, random, -3, 3);
  auto reference = randoms<A>(size.batch * size.queries * levels * form, random, 0, 1);
  std::vector<A> grad_points(2 * samples), grad_weights(samples);
  p.value = value.data(), p.shapes = size.shapes.data(), p.points = points.data();
  p.weights = weights.data(), p.reference = form ? reference.data() : nullptr;
  p.output = output.data(), p.grad_output = grad_output.data();
  p.grad_value = grad_value.data(), p.grad_points = grad_points.data();
  p.grad_weights = grad_weights.data();
  p.batch = size.batch, p.tokens = tokens, p.heads = size.heads, p.channels = size.channels;
  p.queries = size.queries, p.levels = levels, p.per_level = size.per_level;
  p.storage = storage, p.form = form, p.threads = 3;
  for (p.to_locations = 0; p.to_locations < 2; ++p.to_locations) {
    if (msda_forward(&p) || msda_backward(&p)) return false;
  }
  return true;
}

}  // namespace

int main() {
  const std::vector<Size> sizes = {
      {1, 1, 1, 1, 1, {1, 1}},
      {2, 3, 16, 700, 4, {9, 7, 5, 4, 2, 3}},  // packed, several threads
      {3, 2, 32, 40, 3, {30, 41, 15, 20}},     // direct, several threads
      {1, 2, 17, 500, 5, {6, 5, 3, 2, 1, 4}},  // rows that fill no whole vector
      {1, 1, 80, 300, 1, {4, 4}},
      {2, 2, 256, 60, 2, {0, 4, 3, 3}},        // an empty level
  };
  int runs = 0;
  for (const Size& size : sizes) {
    for (std::int64_t form : {0, 2, 4}) {
      const bool fine = run<float>(size, msda::kFloat32, form, 4) &&
                        run<double>(size, msda::kFloat64, form, 8) &&
                        run<float>(size, msda::kBFloat16, form, 2) &&
                        run<float>(size, msda::kFloat16, form, 2);
      if (!fine) return 1;
      runs += 4;
    }
  }
  std::printf("%d problems, forward and backward, nothing found\n", runs);
  return 0;
}
