// What Python may ask about the build and about a launch, without a GPU. Loading this module also
// runs the library initialisers of the other files in the shared object, which register the
// operators.
#include "../core/math.h"
#include "../core/plan.h"
#include "../cpu/isa.h"
#include "../cpu/traits.h"
#include "regions.h"

#include <pybind11/pybind11.h>

#include <sstream>
#include <stdexcept>
#include <string>

namespace py = pybind11;

// Set by setup.py. The commas of a list of architectures are part of the text.
#define BRN_TEXT(...) #__VA_ARGS__
#define BRN_EXPANDED(...) BRN_TEXT(__VA_ARGS__)

namespace brn {
namespace {

py::dict build_info() {
  const std::string nvcc = BRN_EXPANDED(BRN_NVCC);
  py::dict info;
  info["version"] = BRN_EXPANDED(BRN_VERSION);
  info["torch"] = BRN_EXPANDED(BRN_TORCH);
  info["compiler"] = __VERSION__;
  info["cuda"] = !nvcc.empty();
  info["nvcc"] = nvcc;
  info["architectures"] = py::str(BRN_EXPANDED(BRN_ARCHITECTURES)).attr("split")(",");
  if (nvcc.empty()) info["architectures"] = py::list();
  return info;
}

py::dict cpu_info() {
  py::dict info;
  info["instructions"] = cpu::isa().name;
  info["settings"] = cpu::named_traits().name;
  py::list known;
  for (const cpu::NamedTraits& traits : cpu::kKnownTraits) known.append(traits.name);
  info["known_settings"] = known;
  return info;
}

template <typename T>
struct Name {
  const char* name;
  T value;
};
constexpr Name<DType> kDTypes[] = {{"float32", DType::kFloat32},
                                   {"float16", DType::kFloat16},
                                   {"bfloat16", DType::kBFloat16},
                                   {"float64", DType::kFloat64}};
constexpr Name<Layout> kLayouts[] = {{"channels_first", Layout::kChannelsFirst},
                                     {"channels_last", Layout::kChannelsLast}};
constexpr Name<Pass> kPasses[] = {
    {"forward", Pass::kForward}, {"backward", Pass::kBackward}, {"inference", Pass::kInference}};

template <typename T, std::size_t kCount>
T parse(const char* argument, const std::string& got, const Name<T> (&names)[kCount]) {
  std::string known;
  for (const Name<T>& n : names) {
    if (got == n.name) return n.value;
    known += (known.empty() ? "" : ", ") + std::string(n.name);
  }
  throw std::invalid_argument(std::string(argument) + " must be one of " + known + ", got " + got);
}

// A plan together with what it was made for, as the plan sees it, so that Python asks one question
// and reads all the answers.
struct LaunchPlan {
  Pass pass;
  Problem problem;
  Device device;
  Plan plan;
};

Plan make_plan(Pass pass, const Problem& p, const Device& device) {
  switch (pass) {
    case Pass::kForward: return plan_forward(p, device);
    case Pass::kBackward: return plan_backward(p, device);
    case Pass::kInference: break;
  }
  return plan_inference(p, device);
}

LaunchPlan launch_plan(const std::string& pass, std::int64_t batch, std::int64_t channels,
                       std::int64_t spatial, const std::string& layout, const std::string& dtype,
                       int sm_count, int alignment, double l2_bytes, int shared_bytes,
                       int capability) {
  LaunchPlan l;
  l.pass = parse("pass", pass, kPasses);
  l.problem.batch = batch;
  l.problem.channels = channels;
  l.problem.spatial = spatial;
  l.problem.layout = parse("layout", layout, kLayouts);
  l.problem.dtype = parse("dtype", dtype, kDTypes);
  l.problem.alignment = alignment;
  l.device.sm_count = sm_count;
  l.device.l2_bytes = l2_bytes;
  l.device.shared_bytes = shared_bytes;
  l.device.capability = capability;
  if (batch < 1 || channels < 1 || spatial < 1)
    throw std::invalid_argument("batch, channels and spatial must be at least 1");
  if (sm_count < 1)
    throw std::invalid_argument("sm_count must be at least 1, got " + std::to_string(sm_count));
  if (!(l2_bytes >= 0))
    throw std::invalid_argument("l2_bytes must not be negative, got " + std::to_string(l2_bytes));
  if (shared_bytes < 0) {
    throw std::invalid_argument("shared_bytes must not be negative, got " +
                                std::to_string(shared_bytes));
  }
  if (alignment < size_of(l.problem.dtype) || alignment > 16 ||
      (alignment & (alignment - 1)) != 0) {
    throw std::invalid_argument(
        "alignment must be a power of two from the size of an element to 16, got " +
        std::to_string(alignment));
  }
  l.plan = make_plan(l.pass, l.problem, l.device);
  l.problem = as_planned(l.problem, l.plan);
  return l;
}

std::string repr(const LaunchPlan& l) {
  std::ostringstream os;
  os << l.plan;
  return os.str();
}

void define(py::module_& m) {
  m.def("build_info", &build_info,
        "What was built: version, torch, compiler, cuda, nvcc, architectures.");

  m.def("cpu_info", &cpu_info,
        "What the CPU kernels take on this processor: instructions, and whose settings of "
        "known_settings.");

  // The plan's own numbers, and those that need the problem or the device too.
  const auto plan_field = [](auto field) {
    return py::cpp_function([field](const LaunchPlan& l) { return l.plan.*field; });
  };
  py::class_<LaunchPlan>(
      m, "Plan", "How one pass is cut into blocks; csrc/core/geometry.h explains the fields.")
      .def_property_readonly("slot_bytes", plan_field(&Plan::slot_bytes))
      .def_property_readonly("columns", plan_field(&Plan::columns))
      .def_property_readonly("slots", plan_field(&Plan::slots))
      .def_property_readonly("threads", plan_field(&Plan::threads))
      .def_property_readonly("team", plan_field(&Plan::team))
      .def_property_readonly("teams", plan_field(&Plan::teams))
      .def_property_readonly("rounds", plan_field(&Plan::rounds))
      .def_property_readonly("retained", plan_field(&Plan::retained))
      .def_property_readonly("prefetch", plan_field(&Plan::prefetch))
      .def_property_readonly("share", plan_field(&Plan::share))
      .def_property_readonly("slabs", plan_field(&Plan::slabs))
      .def_property_readonly("blocks", [](const LaunchPlan& l) { return l.plan.blocks(); })
      .def_property_readonly("waves", [](const LaunchPlan& l) { return l.plan.waves(); })
      .def_property_readonly("positions_per_pass",
                             [](const LaunchPlan& l) { return l.plan.positions_per_pass(); })
      .def_property_readonly("positions_per_round",
                             [](const LaunchPlan& l) { return l.plan.positions_per_round(); })
      .def_property_readonly(
          "bundles", [](const LaunchPlan& l) { return l.problem.layout == Layout::kBundles; })
      .def_property_readonly(
          "unaligned", [](const LaunchPlan& l) { return l.problem.layout == Layout::kUnaligned; })
      .def_property_readonly("lanes", [](const LaunchPlan& l) { return lanes(l.problem, l.plan); })
      .def_property_readonly("slab_channels",
                             [](const LaunchPlan& l) { return slab_channels(l.problem, l.plan); })
      .def_property_readonly("positions",
                             [](const LaunchPlan& l) { return positions(l.problem, l.plan); })
      .def_property_readonly("control_words",
                             [](const LaunchPlan& l) { return control_words(l.plan.teams); })
      .def_property_readonly("partials_bytes",
                             [](const LaunchPlan& l) { return partials_bytes(l.problem, l.plan); })
      .def_property_readonly(
          "shared_bytes",
          [](const LaunchPlan& l) {
            return static_shared_bytes(l.problem) + dynamic_shared_bytes(l.plan, l.pass);
          },
          "Shared memory that a block takes which computes statistics, at most.")
      .def_property_readonly(
          "dynamic_shared_bytes",
          [](const LaunchPlan& l) { return dynamic_shared_bytes(l.plan, l.pass); },
          "Those of them that depend on the plan: what is prefetched or retained.")
      .def(
          "retains", [](const LaunchPlan& l, int round) { return l.plan.retains(round); },
          py::arg("round"), "Whether this round before the last stays in shared memory.")
      .def_property_readonly("proposals_bytes",
                             [](const LaunchPlan& l) { return proposals_bytes(l.problem); })
      .def_property_readonly("sm_count", [](const LaunchPlan& l) { return l.device.sm_count; })
      .def_property_readonly(
          "resident_blocks",
          [](const LaunchPlan& l) { return resident_blocks(l.problem, l.device.sm_count); },
          "Blocks that the device is sure to hold at once.")
      .def_property_readonly(
          "bytes_moved",
          [](const LaunchPlan& l) {
            return tensors_moved(l.pass) * l.problem.elements() * size_of(l.problem.dtype);
          },
          "The floor: every tensor of the problem's size crosses the memory bus once.")
      .def_property_readonly(
          "bytes_reread",
          [](const LaunchPlan& l) { return bytes_reread(l.problem, l.plan, l.pass); },
          "Bytes that are read a second time, from L2 or memory, because they were not kept.")
      .def_property_readonly(
          "bytes_in_flight",
          [](const LaunchPlan& l) { return bytes_in_flight(l.problem, l.plan, l.device, l.pass); },
          "Those of them that are in work at a time.")
      .def_property_readonly(
          "bytes_missed",
          [](const LaunchPlan& l) { return bytes_missed(l.problem, l.plan, l.device, l.pass); },
          "Those of them that L2 is not expected to hold any more.")
      .def_property_readonly(
          "merging", [](const LaunchPlan& l) { return merging(l.problem, l.plan, l.pass); },
          "Microseconds a slab that the planner expects a block to take for merging what its team "
          "has published.")
      .def_property_readonly(
          "microseconds",
          [](const LaunchPlan& l) { return estimate(l.problem, l.plan, l.device, l.pass); },
          "What the planner expects, to compare plans by: a model of an H200, not a measurement.")
      .def("__eq__", [](const LaunchPlan& a, const LaunchPlan& b) { return a.plan == b.plan; })
      .def("__repr__", &repr);

  m.def("plan", &launch_plan, py::arg("pass_"), py::arg("batch"), py::arg("channels"),
        py::arg("spatial"), py::kw_only(), py::arg("layout") = "channels_first",
        py::arg("dtype") = "float32", py::arg("sm_count") = Device{}.sm_count,
        py::arg("alignment") = 16, py::arg("l2_bytes") = Device{}.l2_bytes,
        py::arg("shared_bytes") = Device{}.shared_bytes,
        py::arg("capability") = Device{}.capability,
        "The plan of a pass (forward, backward, inference) over x of [batch, channels, spatial] on "
        "sm_count SMs of this compute capability (10 * major + minor) with shared_bytes of shared "
        "memory each and an L2 of l2_bytes.");

  m.def("may_repeat", &binding::may_repeat,
        "Whether this thread is in a backward pass or under saved-tensor hooks, as the operators "
        "see it.");
  m.def("under_saved_tensor_hooks", &binding::under_saved_tensor_hooks,
        "Whether this thread is under saved-tensor hooks, if they are where they were.");
  m.def(
      "trust_saved_tensor_hooks", [](bool legible) { binding::hooks_are_legible = legible; },
      py::arg("legible"), "Whether may_repeat may go by under_saved_tensor_hooks.");

  m.attr("MAX_THREADS") = kMaxThreads;
  m.attr("MIN_THREADS") = kMinThreads;
  m.attr("MAX_SLAB_CHANNELS") = kMaxSlabChannels;
  m.attr("PREFETCH_BYTES") = kPrefetchBytes;
  m.attr("LINE_WORDS") = kLineWords;
  m.attr("STAT_ROWS") = kStatRows;
}

}  // namespace
}  // namespace brn

PYBIND11_MODULE(_C, m) { brn::define(m); }
