"""csrc/core/divisor.h against the processor's own division: kernels find a slot's plane with it,
and one that is off by one reads another channel's."""

import os
import subprocess
from pathlib import Path

import pytest

DIVISOR = Path(__file__).resolve().parents[1] / "csrc/core/divisor.h"
CXX = os.environ.get("CXX", "c++")
FLAGS = [
    "-std=c++17",
    "-O2",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-fsanitize=undefined",
    "-fno-sanitize-recover=all",
]

# All small divisors, those beside powers of two, and random ones; each with the dividends on both
# sides of its multiples, where a quotient that is a little off becomes another.
PROGRAM = """
#include "divisor.h"
#include <cstdio>
#include <random>
#include <vector>

int main() {
  const std::int64_t most = 0x7fffffff;
  std::vector<std::int64_t> divisors;
  for (int d = 1; d <= 5000; ++d) divisors.push_back(d);
  for (int bit = 12; bit < 40; ++bit)
    for (int off = -2; off <= 2; ++off) divisors.push_back((std::int64_t{1} << bit) + off);
  std::mt19937_64 random(7);
  for (int i = 0; i < 5000; ++i) divisors.push_back(1 + random() % (std::uint64_t{1} << 32));
  for (const std::int64_t d : divisors) {
    const brn::Divisor by(d);
    for (int i = 0; i < 600; ++i) {
      const std::int64_t near = i < 300 ? i / 3 : most / d - (i - 300) / 3;
      const std::int64_t n = i % 2 ? near * d + i % 3 - 1 : random() % (most + 1);
      if (n < 0 || n > most) continue;
      if (by.quotient(static_cast<unsigned>(n)) != n / d) {
        std::printf("%lld / %lld\\n", static_cast<long long>(n), static_cast<long long>(d));
        return 1;
      }
    }
  }
  for (int bits = 0; bits < 31; ++bits)
    if (brn::bits_of(1 << bits) != bits) return 2;
  std::puts("ok");
}
"""


def run(header: str, folder: Path) -> subprocess.CompletedProcess:
    (folder / "divisor.h").write_text(header)
    (folder / "main.cpp").write_text(PROGRAM)
    command = [CXX, *FLAGS, f"-I{DIVISOR.parent}", str(folder / "main.cpp")]
    subprocess.run([*command, "-o", str(folder / "main")], check=True)
    return subprocess.run([folder / "main"], capture_output=True, text=True, check=False)


def test_quotients(tmp_path):
    done = run(DIVISOR.read_text(), tmp_path)
    assert done.stdout == "ok\n", done.stdout + done.stderr


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        (" + divisor - 1) / divisor", ") / divisor"),
        ("shift_ - 31) < divisor", "shift_ - 30) < divisor"),
        ("multiplier_ = 0;", "multiplier_ = 3;"),
    ],
    ids=["rounded down", "a bit less", "one for huge divisors"],
)
def test_the_test_would_notice(tmp_path, right, wrong):
    header = DIVISOR.read_text()
    assert header.count(right) == 1
    done = run(header.replace(right, wrong), tmp_path)
    assert done.returncode != 0 and done.stdout != "ok\n"
