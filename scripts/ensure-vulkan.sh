#!/usr/bin/env bash
# Makes sure that a Vulkan driver is there: leaves a machine that has one alone, else installs Mesa's software
# driver (lavapipe) where it may, else says in one line what to install. Nothing to do on macOS and Windows.
set -euo pipefail

case "$(uname -s)" in
  Linux) ;;
  *) exit 0 ;; # Metal and DX12 come with the system
esac

# A driver is a manifest in one of the loader's folders that names a library which is really there, and the
# loader itself. Manifests of GPUs that this machine lacks do no harm: lavapipe comes in the same package.
has_loader() {
  # No pipe: where grep has seen enough, ldconfig would end by a signal and count as failed.
  grep -q 'libvulkan\.so\.1' <<<"$(ldconfig -p 2>/dev/null || true)" && return 0
  local file
  for file in /usr/lib*/libvulkan.so.1 /usr/lib/*/libvulkan.so.1 /usr/local/lib/libvulkan.so.1; do
    if [ -e "$file" ]; then return 0; fi
  done
  return 1
}

has_driver() {
  [ -n "${VK_DRIVER_FILES:-}${VK_ICD_FILENAMES:-}" ] && return 0
  local folder
  for folder in /usr/share/vulkan/icd.d /usr/local/share/vulkan/icd.d /etc/vulkan/icd.d \
    /run/opengl-driver/share/vulkan/icd.d "${XDG_DATA_HOME:-$HOME/.local/share}/vulkan/icd.d"; do
    # Any real GPU's own driver, or lavapipe.
    if ls "$folder"/lvp_icd*.json >/dev/null 2>&1; then return 0; fi
    if ls "$folder"/*nvidia*.json >/dev/null 2>&1 && [ -e /dev/nvidiactl ]; then return 0; fi
    if ls "$folder"/*.json >/dev/null 2>&1 && ls /dev/dri/renderD* >/dev/null 2>&1; then return 0; fi
  done
  return 1
}

as_root() {
  if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo -n "$@"; fi
}

may_install() {
  [ "$(id -u)" -eq 0 ] || { command -v sudo >/dev/null && sudo -n true 2>/dev/null; }
}

install_lavapipe() {
  if command -v apt-get >/dev/null; then
    as_root apt-get update -qq
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends mesa-vulkan-drivers libvulkan1
  elif command -v dnf >/dev/null; then
    as_root dnf install -y -q mesa-vulkan-drivers vulkan-loader
  elif command -v pacman >/dev/null; then
    as_root pacman -Sy --noconfirm --needed vulkan-swrast vulkan-icd-loader
  elif command -v zypper >/dev/null; then
    as_root zypper --non-interactive --quiet install libvulkan_lvp libvulkan1
  elif command -v apk >/dev/null; then
    as_root apk add --quiet mesa-vulkan-swrast vulkan-loader
  else
    return 1
  fi
}

advice="Install a Vulkan driver, for example Mesa's: 'mesa-vulkan-drivers' (Debian, Ubuntu, Fedora), 'vulkan-swrast' (Arch), 'libvulkan_lvp' (openSUSE), 'mesa-vulkan-swrast' (Alpine)."

if has_loader && has_driver; then exit 0; fi
if ! may_install; then
  echo "No Vulkan driver found, and no right to install one. $advice" >&2
  exit 1
fi
echo "No Vulkan driver found: installing Mesa's lavapipe with the system's package manager." >&2
if ! install_lavapipe >&2 || ! has_loader || ! has_driver; then
  echo "Could not install a Vulkan driver. $advice" >&2
  exit 1
fi
