# Shared by quickstart, check and .ci/run. Source it from bash; it changes to the top of the source tree.
# Every function either does its work, skips what is done already, or ends the script with one sentence that says what is wrong.

set -euo pipefail
TOP=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cd "$TOP"
VENV=$TOP/.venv
# Ubuntu's needrestart, run by apt-get, is to restart nobody's services for our packages.
export PIP_DISABLE_PIP_VERSION_CHECK=1 DEBIAN_FRONTEND=noninteractive NEEDRESTART_MODE=l

say() { printf '%s\n' "== $*"; }
die() { printf '%s: %s\n' "${0##*/}" "$*" >&2; exit 1; }

need_root() {
    [ "$(id -u)" = 0 ] || die "needs root (mounting /bpfs, namespaces and ptrace): run it with sudo"
}

# The kernel interfaces everything is built on, each probed or, where a probe would need a compiler, by version.
need_kernel() {
    [ "$(uname -s)" = Linux ] || die "needs Linux, this is $(uname -s)"
    [ "$(uname -m)" = x86_64 ] || die "needs an x86_64 machine, this is $(uname -m)"
    local major minor
    IFS=.- read -r major minor _ < <(uname -r)
    # PTRACE_GET_RSEQ_CONFIGURATION is the newest call that cannot be done without.
    if [ "$major" -lt 5 ] || { [ "$major" = 5 ] && [ "${minor%%[!0-9]*}" -lt 13 ]; }; then
        die "kernel $(uname -r) is too old: Linux 5.13 or newer is needed"
    fi
    [ -e /proc/self/ns/pid ] || die "this kernel has no pid namespaces (CONFIG_PID_NS)"
    [ -e /proc/self/ns/net ] || die "this kernel has no network namespaces (CONFIG_NET_NS)"
    [ -w /proc/sys/kernel/ns_last_pid ] ||
        die "this kernel cannot choose pids (no /proc/sys/kernel/ns_last_pid: CONFIG_CHECKPOINT_RESTORE)"
    # Privileged in name only: a container without these capabilities gets no further.
    local effective
    effective=$((0x$(sed -n 's/^CapEff:[[:space:]]*//p' /proc/self/status)))
    ((effective >> 21 & 1)) || die "root here lacks CAP_SYS_ADMIN (an unprivileged container?)"
    ((effective >> 19 & 1)) || die "root here lacks CAP_SYS_PTRACE (an unprivileged container?)"
}

need_fuse() {
    if [ ! -e /dev/fuse ]; then
        command -v modprobe >/dev/null && modprobe fuse 2>/dev/null || true
    fi
    [ -e /dev/fuse ] || die "there is no /dev/fuse: load the module (modprobe fuse) or give the container the device"
    (: <>/dev/fuse) 2>/dev/null || die "/dev/fuse cannot be opened: the container does not allow the device"
}

# The Python that the virtual environment is made from: $PYTHON, else the first of these that is new enough.
find_python() {
    local candidate
    for candidate in ${PYTHON:-} /usr/bin/python3 python3 python3.14 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return 0
        fi
    done
    return 1
}

have_package() { dpkg-query -W -f '${db:Status-Status}\n' "$1" 2>/dev/null | grep -qx installed; }

# Installs those of the packages that are missing; does not touch the network when none is.
install_packages() {
    local missing=() package
    for package in "$@"; do
        have_package "$package" || missing+=("$package")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    command -v apt-get >/dev/null ||
        die "these are missing and this is not Debian or Ubuntu, please install them by hand: ${missing[*]}"
    say "installing packages: ${missing[*]}"
    # A machine that was just switched on may be at its own upgrades: wait for them.
    local install=(apt-get install -y -q --no-install-recommends -o DPkg::Lock::Timeout=120 "${missing[@]}")
    # The lists may be absent or stale: only then is the (slow) update needed.
    "${install[@]}" </dev/null >"$LOG" 2>&1 && return 0
    # Without a network it fetches nothing, and yet ends well: what comes after it tells.
    apt-get update -q </dev/null >>"$LOG" 2>&1 || { tail -n 20 "$LOG" >&2; die "apt-get update failed (no network?)"; }
    "${install[@]}" </dev/null >>"$LOG" 2>&1 ||
        { tail -n 20 "$LOG" >&2; die "apt-get could not install (no network?): ${missing[*]}"; }
}

# What is compiled, and what the demonstration and the tests call.
install_system() {
    LOG=$(mktemp)
    local packages=(gcc libc6-dev make pkg-config musl-tools libfuse3-dev fuse3 procps iproute2 xz-utils)
    # pkg-config is a virtual package on releases that ship pkgconf instead.
    if command -v pkg-config >/dev/null; then packages=("${packages[@]/pkg-config/}"); fi
    local python
    if [ -x "$VENV/bin/python" ] && "$VENV/bin/python" -c '' 2>/dev/null; then
        python=$VENV/bin/python
    else
        python=$(find_python) || { install_packages python3; python=$(find_python) || die "needs Python 3.11 or newer, this is $(python3 --version 2>&1): install one, or name it with PYTHON=/path/to/python3"; }
    fi
    # pyfuse3 is compiled against the headers of the very Python it will run in; Debian splits both off.
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        packages+=("$(system_python_package "$python" venv)")
    fi
    if ! "$python" -c 'import os, sysconfig, sys; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))'; then
        packages+=("$(system_python_package "$python" dev)")
    fi
    # shellcheck disable=SC2206  # word splitting drops what was emptied above
    packages=(${packages[*]})
    install_packages "${packages[@]}"
    rm -f "$LOG"
    PYTHON_FOUND=$python
}

# What tests run bpsh under, as people do who take it for rsh or ssh, and look at screens with, and runtimes whose programs they
# move: about 30 s where none is there. Without them those tests are skipped.
install_test_tools() {
    LOG=$(mktemp)
    (install_packages git rsync parallel pdsh clustershell tmux groff-base htop vim less psmisc strace systemd python3-numpy libopenblas0-pthread golang-go default-jre-headless) || say "tests of what is missing will be skipped"
    rm -f "$LOG"
    install_sshd
}

# What benchmarks compare bpsh with. Unpacked and not installed, for that would start it, on all of the machine's addresses.
install_sshd() {
    local folder=$VENV/sshd package
    if [ -x "$folder/usr/sbin/sshd" ] || command -v sshd >/dev/null; then return 0; fi
    mkdir -p "$folder"
    if (cd "$folder" && apt-get download -q openssh-server libwrap0) >"$folder/log" 2>&1; then
        for package in "$folder"/*.deb; do dpkg -x "$package" "$folder"; done
    else
        say "there is no openssh-server to be had: benchmarks do not compare with ssh"
    fi
    rm -f "$folder"/*.deb
}

# "python3.11-dev" for the interpreter python3.11: only a distribution's own Python has such packages.
system_python_package() {
    "$1" -c 'import sys; print("python%d.%d-" % sys.version_info[:2] + sys.argv[1])' "$2"
}

# Whether a stamp says that this very project is installed with (at least) these extras: installed_with WANT EXTRA...
installed_with() {
    local want=$1 stamp extra has
    shift
    for stamp in "$VENV"/.installed*; do
        [ "$(cat "$stamp" 2>/dev/null)" = "$want" ] || continue
        has=-${stamp##*/.installed}-
        for extra in "$@"; do
            [[ $has == *-$extra-* ]] || continue 2
        done
        return 0
    done
    return 1
}

# One folder, .venv, with the dependencies and the project itself as an editable install. The stamps make a
# second run a matter of milliseconds, and keep it off the network.
# Arguments: the extras that are wanted, e.g. test lint.
install_venv() {
    local extras want
    extras=$(IFS=,; printf '%s' "$*")
    if ! "$VENV/bin/python" -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        say "making the virtual environment .venv with $("$PYTHON_FOUND" --version)"
        "$PYTHON_FOUND" -m venv --clear "$VENV" || die "the virtual environment could not be made with $PYTHON_FOUND"
    fi
    want=$("$VENV/bin/python" -c 'import sys; print(sys.version)'; sha256sum pyproject.toml mountscripts/hatch_build.py; printf '%s\n' "$TOP")
    if installed_with "$want" "$@"; then return 0; fi
    say "installing Python dependencies${extras:+ (with $extras)}"
    # The back end first, so that nothing is fetched for an isolated build of our own tree.
    local log=$VENV/install.log target=.${extras:+[$extras]}
    if ! { "$VENV/bin/python" -m pip install -q "hatchling>=1.24" &&
        "$VENV/bin/python" -m pip install -q --no-build-isolation -e "$target"; } </dev/null >"$log" 2>&1 &&
        ! "$VENV/bin/python" -m pip install -q -e "$target" </dev/null >>"$log" 2>&1; then
        tail -n 30 "$log" >&2
        die "pip could not install the dependencies (no network? all of it: $log)"
    fi
    printf '%s\n' "$want" >"$VENV/.installed${extras:+-${extras//,/-}}"
}

build_helpers() {
    make -s -j"$(nproc)" -C mountscripts helpers || die "the C helpers could not be built"
}

# What the tests of network boot take: an emulator, and a kernel that is not this machine's. The package is kept beside the
# environment. Elsewhere than on Debian there is none of this name, and these tests are skipped.
install_boot() {
    local meta name folder=$VENV/boot
    LOG=$(mktemp)
    install_packages qemu-system-x86 ipxe-qemu ovmf kmod e2fsprogs zstd cpio openssl ipxe grub-common grub-pc-bin grub-efi-amd64-bin xorriso mtools
    (install_packages nfs-common && unpack_nfs_server "$folder/nfs") || say "the tests of NFS will be skipped"
    rm -f "$LOG"
    mkdir -p "$folder"
    # The small one for most tests, the general one for other cards than virtio.
    for meta in linux-image-cloud-amd64 linux-image-amd64; do
        if compgen -G "$folder/$meta.deb" >/dev/null; then continue; fi
        name=$(apt-cache depends "$meta" 2>/dev/null | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)/\1/p')
        if [ -z "$name" ]; then say "there is no package $meta: the tests that boot it are skipped"; continue; fi
        say "fetching the kernel package $name"
        if (cd "$folder" && apt-get download -q "$name") >"$folder/log" 2>&1; then
            mv "$folder/$name"_*.deb "$folder/$meta.deb"
        else
            rm -f "$folder/$name"_*.deb
            say "the kernel package $name cannot be fetched: the tests that boot it are skipped"
        fi
    done
}

# A server of NFS in user space, with the libraries that it wants and that are not here: unpacked only, for installed it
# would be started with this machine, now and ever after. unpack_nfs_server FOLDER
unpack_nfs_server() {
    local package
    if [ -e "$1/usr/bin/ganesha.nfsd" ] || command -v ganesha.nfsd >/dev/null; then return 0; fi
    say "fetching an NFS server for the tests"
    mkdir -p "$1/partial"
    apt-get install -y -q --no-install-recommends --download-only -o Dir::Cache::archives="$1" nfs-ganesha-vfs \
        </dev/null >"$LOG" 2>&1 || { tail -n 20 "$LOG" >&2; return 1; }
    for package in "$1"/*.deb; do dpkg-deb -x "$package" "$1" || return 1; done
    rm -f "$1"/*.deb
}

# Everything up to a working tree: packages, environment, helpers. Arguments: extras of pyproject.toml.
install_all() {
    need_root
    need_kernel
    need_fuse
    install_system
    install_venv "$@"
    if [[ " $* " == *" test "* ]]; then install_boot; fi
    build_helpers
}
