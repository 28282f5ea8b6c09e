# The command with Mesa's lavapipe: runs where there is no GPU, and on a GPU whose driver is given to the container.
FROM rust:1-slim-bookworm AS build
WORKDIR /src
COPY . .
ENV CARGO_PROFILE_RELEASE_STRIP=symbols
RUN cargo build --release --locked --bin exflow

FROM debian:bookworm-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends mesa-vulkan-drivers libvulkan1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home exflow
COPY --from=build /src/target/release/exflow /usr/local/bin/exflow
USER exflow
EXPOSE 8080/tcp
ENTRYPOINT ["exflow"]
CMD ["--help"]
