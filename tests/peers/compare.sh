#!/usr/bin/env bash
# Prefill and decode of the reference model, exflow and llama.cpp's Vulkan back end in turn on the same adapter; and how far the
# logits of each are from those of llama.cpp's CPU back end in f32.
#
#   apt-get install cmake ninja-build glslc libvulkan-dev spirv-headers   # Debian
#   tests/peers/compare.sh FOLDER [ROUNDS]
#
# FOLDER (about 4 GB, outside the repository) keeps the peer's build and the model from one run to the next. The peer is
# built from PyPI's source package of llama-cpp-python; one block of it asks for an extension that only validation needs
# and that Debian's headers lack, and is cut out. Each side runs with the LP_NUM_THREADS that suits it: the peer with
# lavapipe's own choice, exflow with what it chooses for itself.
set -euo pipefail

FOLDER=${1:?usage: compare.sh FOLDER [ROUNDS]}
ROUNDS=${2:-2}
VERSION=0.3.36
here=$(cd "$(dirname "$0")" && pwd)
exflow=${EXFLOW:-$here/../../target/release/exflow}
mkdir -p "$FOLDER"
cd "$FOLDER"

if [ ! -d venv ]; then
    python3 -m venv venv
    venv/bin/pip install -q numpy safetensors gguf typing_extensions
fi
if [ ! -f olmoe/model-f32.gguf ]; then
    venv/bin/python "$here/make_model.py" olmoe --gguf
fi
source=llama_cpp_python-$VERSION/vendor/llama.cpp
if [ ! -x build/bin/llama-bench ] || [ ! -x build/bin/llama-quantize ]; then
    venv/bin/pip download -q --no-deps --no-binary :all: "llama-cpp-python==$VERSION"
    tar xzf "llama_cpp_python-$VERSION.tar.gz"
    python3 - "$source/ggml/src/ggml-vulkan/ggml-vulkan.cpp" <<'PATCH'
import sys

path = sys.argv[1]
text = open(path).read()
first = text.find("    VkBool32 enable_best_practice = layer_settings;")
if first >= 0:
    text = text[:first] + text[text.index("    vk::InstanceCreateInfo instance_create_info(") :]
    text = text.replace("app_info, layers, extensions, &layer_setting_info);", "app_info, layers, extensions);")
    open(path, "w").write(text)
PATCH
    cmake -S "$source" -B build -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_VULKAN=ON -DLLAMA_CURL=OFF \
        -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF
    nice cmake --build build --target llama-bench llama-quantize
fi
if [ ! -f olmoe/model-q8_0.gguf ]; then
    build/bin/llama-quantize olmoe/model-f32.gguf olmoe/model-q8_0.gguf q8_0 >quantize.log 2>&1
fi

peer() {
    GGML_VK_VISIBLE_DEVICES=0 build/bin/llama-bench -m "olmoe/model-$1.gguf" -ngl 99 -p "$2" -n "$3" -r 1 -o json |
        python3 -c 'import json, sys
for run in json.load(sys.stdin):
    prompt, decode, rate = run["n_prompt"], run["n_gen"], run["avg_ts"]
    name = f"pp{prompt}" if prompt else f"tg{decode}"
    print(f"llama.cpp '"$1"' {name} {rate:.2f}")'
}
# The flags that hold matrices in a type.
held() {
    if [ "$1" = q8_0 ]; then echo --quant q8_0; else echo --dtype "$1"; fi
}
ours() {
    local type=$1 prompt=$2 decode=$3 batch=$4
    # shellcheck disable=SC2046
    "$exflow" bench model -m olmoe $(held "$type") -p "$prompt" -n "$decode" --batch "$batch" -r 1 --format json |
        python3 -c 'import json, sys
for run in json.load(sys.stdin):
    test, batch, rate = run["test"], run["batch"], run["tokens_per_s"]
    print(f"exflow '"$type"' {test} batch {batch} {rate:.2f}")'
}

for round in $(seq "$ROUNDS"); do
    for type in f32 f16 q8_0; do
        peer "$type" 64 8
        ours "$type" 128 32 1
        ours "$type" 0 16 8
    done
done

# The same 64 ids for all, keys and values in f32 for all.
ids=$(python3 -c 'import random
random.seed(1)
print(",".join(str(random.randrange(8192)) for _ in range(64)))')
make() {
    venv/bin/python "$here/logits.py" make "llama_cpp_python-$VERSION" build "olmoe/model-$1.gguf" "$ids" "$2" "${@:3}" 2>logits.log
}
apart() {
    echo "$1, KL divergence from llama.cpp on the CPU in f32: $(venv/bin/python "$here/logits.py" compare cpu-f32.npy "$2")"
}
make f32 cpu-f32.npy
for type in f32 f16 q8_0; do
    GGML_VK_VISIBLE_DEVICES=0 make "$type" peer.npy --vulkan
    apart "llama.cpp $type" peer.npy
    # shellcheck disable=SC2046
    "$exflow" logits -m olmoe $(held "$type") --prompt-ids "$ids" --out ours.npz 2>logits.log
    apart "exflow $type" ours.npz
done
# Rows of products with matrices that have scales are rounded too, to bytes or, where that was measured to gain, to f16.
for setting in "q8_0 fast" "q4_0 exact" "q4_0 fast"; do
    read -r quant numerics <<<"$setting"
    "$exflow" logits -m olmoe --quant "$quant" --numerics "$numerics" --prompt-ids "$ids" --out ours.npz 2>logits.log
    apart "exflow $setting" ours.npz
done
