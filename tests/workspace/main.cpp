// Who shares control words with whom, and which plans are found again: csrc/binding/workspace.h and
// plans.h over a fake CUDA runtime.
#include "../../csrc/binding/workspace.h"

#include <cstdio>
#include <set>
#include <string>

using brn::binding::ControlPool;
using brn::binding::device_state;
using brn::binding::Plans;

#define EXPECT(condition)                                       \
  if (!(condition)) {                                           \
    std::printf("line %d: not so: %s\n", __LINE__, #condition); \
    ++failures;                                                 \
  }
static int failures = 0;

static bool in_a_chunk(const unsigned* slot, std::int64_t words) {
  for (const auto& [begin, size] : fake.chunks) {
    if (slot >= begin && slot + words <= begin + size) return true;
  }
  return false;
}

int main() {
  constexpr int kSms = 132;
  constexpr std::int64_t kMostTeams = kSms * 3 / 2;
  const std::int64_t words = brn::control_words(kMostTeams);

  ControlPool pool;
  CUstream_st first{1}, second{2};
  unsigned* const eager = pool.slot(&first, kSms);
  EXPECT(pool.slot(&first, kSms) == eager);
  EXPECT(pool.slot(&second, kSms) != eager);

  // Zero, and every word of the largest launch belongs to it alone.
  for (std::int64_t i = 0; i < words; ++i) EXPECT(eager[i] == 0);
  EXPECT(std::llabs(pool.slot(&second, kSms) - eager) >= words);

  // A capture shares with no eager work, with no other stream and with no other capture.
  first.capture = 7;
  unsigned* const captured = pool.slot(&first, kSms);
  EXPECT(captured != eager);
  EXPECT(pool.slot(&first, kSms) == captured);
  second.capture = 7;
  EXPECT(pool.slot(&second, kSms) != captured);
  first.capture = 8;
  EXPECT(pool.slot(&first, kSms) != captured);
  first.capture = 0;
  EXPECT(pool.slot(&first, kSms) == eager);

  // A new stream in the place of an old one is another stream.
  first.id = 3;
  EXPECT(pool.slot(&first, kSms) != eager);

  // Many slots: chunk after chunk, none twice, all zero and inside what was allocated.
  std::set<unsigned*> slots;
  for (unsigned long long id = 100; id < 300; ++id) {
    CUstream_st stream{id, id % 2 ? id : 0};
    unsigned* const slot = pool.slot(&stream, kSms);
    EXPECT(slots.insert(slot).second);
    EXPECT(in_a_chunk(slot, words));
    EXPECT(slot[0] == 0 && slot[words - 1] == 0);
  }
  EXPECT(fake.chunks.size() == 4);

  // Nothing of this can break a capture that is under way, and the mode is put back.
  EXPECT(fake.unsafe_calls == 0);
  EXPECT(fake.mode == cudaStreamCaptureModeGlobal);

  // An error names the call, is cleared, and leaves the pool usable.
  ControlPool poor;
  fake.out_of_memory = true;
  std::string message;
  try {
    poor.slot(&first, kSms);
  } catch (const std::runtime_error& error) {
    message = error.what();
  }
  EXPECT(message ==
         "batchrenorm_cuda: cudaMalloc of control words: cudaErrorMemoryAllocation: out of memory");
  EXPECT(fake.errors_cleared == 1);
  EXPECT(fake.mode == cudaStreamCaptureModeGlobal);
  fake.out_of_memory = false;
  EXPECT(poor.slot(&first, kSms) != nullptr);

  // One state a device, at a stable address.
  fake.attributes[cudaDevAttrMultiProcessorCount] = 100;
  auto& zero = device_state(0);
  fake.attributes[cudaDevAttrMultiProcessorCount] = 101;
  auto& one = device_state(1);
  EXPECT(&zero == &device_state(0) && &zero != &one);
  EXPECT(zero.sm_count == 100 && one.sm_count == 101 && zero.capability == 90);
  EXPECT(zero.control.slot(&first, 100) != one.control.slot(&first, 101));

  // Whatever came before, a plan is the one that the planner would make. More problems than there
  // are places, neighbours that differ in one field, each asked for twice in a row and once more.
  using brn::DType;
  using brn::Layout;
  int made = 0;
  static int* const count = &made;
  Plans plans([](const brn::Problem& p, const brn::Device& d) {
    ++*count;
    return brn::plan_forward(p, d);
  });
  const brn::Device device;
  for (int again = 0; again < 2; ++again) {
    for (std::int64_t batch = 1; batch < 8; ++batch) {
      for (const std::int64_t channels : {3, 64, 256})
        for (const std::int64_t spatial : {1, 49, 3136})
          for (const Layout layout : {Layout::kChannelsFirst, Layout::kChannelsLast})
            for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16})
              for (const int alignment : {4, 16}) {
                const brn::Problem p{batch, channels, spatial, layout, dtype, alignment};
                EXPECT(plans.of(p, device) == brn::plan_forward(p, device));
                const int before = made;
                EXPECT(plans.of(p, device) == brn::plan_forward(p, device));
                EXPECT(made == before);
              }
    }
  }

  if (failures == 0) std::puts("ok");
  return failures != 0;
}
