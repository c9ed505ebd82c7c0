#!/usr/bin/env bash
# GPAW and its PAW data sets, with unimat-jax of this clone, into the active Python environment:
#     bash docs/install_gpaw.sh
# for `unimat stability --energy_model=gpaw`. PYTHON names the interpreter (default: python). As root on Debian or Ubuntu
# it installs what is missing to build GPAW; elsewhere it names that. GPAW is GPL-3: unimat-jax calls it, and has none of it.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# GPAW's C++ code against libxc, a BLAS and FFTW, in one program: what does not link here does not there either.
cat >"$work/try.cpp" <<'END'
#include <Python.h>
#include <cblas.h>
#include <fftw3.h>
#include <xc.h>
int main() { fftw_cleanup(); return xc_family_from_id(1, nullptr, nullptr) + (int)cblas_dasum(0, nullptr, 1); }
END
include=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
builds() { g++ "$work/try.cpp" -o "$work/try" -I"$include" -lxc -lopenblas -lfftw3 >"$work/log" 2>&1; }

if ! builds; then
  packages="g++ libxc-dev libopenblas-dev libfftw3-dev"
  [[ -f "$include/Python.h" ]] || packages="$packages python3-dev"
  if command -v apt-get >/dev/null && [[ $(id -u) == 0 ]]; then
    echo "installing $packages"
    apt-get update -qq
    # shellcheck disable=SC2086
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $packages >"$work/apt" 2>&1 || tail "$work/apt"
  fi
  builds || {
    echo "GPAW cannot be built here yet:" && grep -iE 'error|cannot find|not found' "$work/log" | head -4
    echo "Install its libraries and run this again: sudo apt-get install $packages"
    echo "(Fedora: gcc-c++ libxc-devel openblas-devel fftw-devel python3-devel; macOS: brew install libxc openblas fftw)"
    exit 1
  } >&2
fi

# Said outright: left to itself the build takes whatever MPI is there, and a C compiler for C++ where there is none.
printf "compiler = 'g++'\nmpi = False\nfftw = True\nlibraries = ['xc', 'openblas', 'fftw3']\n" >"$work/siteconfig.py"
GPAW_CONFIG="$work/siteconfig.py" "$python" -m pip install -e "$root[dft]"

echo "trying it: silicon"
cd "$work"
OMP_NUM_THREADS=1 "$python" - <<'END'
from ase.build import bulk
from gpaw import GPAW, PW

atoms = bulk("Si", a=5.43)
atoms.calc = GPAW(mode=PW(340), xc="PBE", kpts={"size": (4, 4, 4), "gamma": True}, txt=None)
energy = atoms.get_potential_energy()
if abs(energy + 10.601) > 0.005:
    raise SystemExit(f"GPAW gives {energy:.4f} eV for two atoms of silicon instead of -10.601: do not trust this build")
print(f"GPAW works: {energy:.4f} eV for two atoms of silicon")
END
