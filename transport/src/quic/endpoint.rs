//! Socket and connection parameters. Each number here cures something that was measured.

use super::congestion::BoundedWindowConfig;
use super::options::{Congestion, MIN_UDP_PAYLOAD, QuicOptions};
use super::socket::CappedSocket;
use super::tls::Tls;
use quinn::{
    AckFrequencyConfig, Endpoint, EndpointConfig, IdleTimeout, MtuDiscoveryConfig, TransportConfig, VarInt,
};
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

/// Control, rows, bulk.
pub(crate) const STREAMS: u32 = 3;
/// A stream may be ahead of its reader by this much. quinn ends a connection whose stream is cut into more than
/// 1024 pieces; staying under 2 * 1024 of the smallest packets means that plain loss can never do that.
const STREAM_WINDOW: u32 = 2 * 1024 * MIN_UDP_PAYLOAD as u32;
/// First guess of the round trip: a handshake packet that is lost is repeated after three of these.
const INITIAL_RTT: Duration = Duration::from_millis(50);
/// The peer acknowledges after at most this long; 25 ms, the default, would be part of every probe timeout.
const MAX_ACK_DELAY: Duration = Duration::from_millis(1);
/// So many packets may come before the next is acknowledged at once, unless one is missing. An exchange of small
/// payloads is one packet per peer and direction: acknowledging every second one, the default, is half as many packets
/// again. The floor of [`BoundedWindowConfig`] is above it, so that no sender waits for an acknowledgement for long.
const ACK_THRESHOLD: u32 = 8;
/// Handshakes under way at once, from anybody.
const MAX_INCOMING: usize = 256;

/// An endpoint with both sides of a rank's configuration.
pub(crate) struct Bound {
    pub(crate) endpoint: Endpoint,
    pub(crate) client: quinn::ClientConfig,
    pub(crate) address: SocketAddr,
}

/// Opens the UDP socket. Must be called within the runtime that will drive it.
pub(crate) fn bind(listen: SocketAddr, tls: &Tls, options: &QuicOptions) -> io::Result<Bound> {
    let socket = UdpSocket::bind(listen)?;
    if !options.untuned {
        set_buffers(&socket, options.socket_buffer_bytes);
    }
    let address = socket.local_addr()?;
    let mut config = EndpointConfig::default();
    config.max_udp_payload_size(options.max_udp_payload).map_err(io::Error::other)?;
    let mut server = quinn::ServerConfig::with_crypto(Arc::clone(&tls.server) as _);
    server.transport_config(Arc::new(transport(options, STREAMS)));
    server.migration(false);
    server.max_incoming(MAX_INCOMING);
    let mut client = quinn::ClientConfig::new(Arc::clone(&tls.client) as _);
    client.transport_config(Arc::new(transport(options, 0)));
    let runtime = Arc::new(quinn::TokioRuntime);
    let socket = CappedSocket::wrap(socket, &*runtime, options.max_udp_payload, options.link)?;
    let endpoint = Endpoint::new_with_abstract_socket(config, Some(server), socket, runtime)?;
    Ok(Bound { endpoint, client, address })
}

/// Bursts of all peers at once must fit: the system's default of about 200 KB does not hold one round. The
/// system may grant less than asked for, which costs speed and not correctness.
fn set_buffers(socket: &UdpSocket, bytes: usize) {
    let Ok(state) = quinn::udp::UdpSocketState::new(socket.into()) else { return };
    let _ = state.set_recv_buffer_size(socket.into(), bytes);
    let _ = state.set_send_buffer_size(socket.into(), bytes);
    if let Ok(granted) = state.recv_buffer_size(socket.into())
        && granted < bytes
    {
        tracing::warn!(
            asked = bytes,
            granted,
            "small receive buffer: raise net.core.rmem_max for more speed"
        );
    }
}

fn transport(options: &QuicOptions, incoming_streams: u32) -> TransportConfig {
    let mut config = TransportConfig::default();
    config
        .max_concurrent_bidi_streams(incoming_streams.into())
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .datagram_receive_buffer_size(None)
        .max_idle_timeout(IdleTimeout::try_from(options.idle_timeout).ok())
        .keep_alive_interval(Some(options.idle_timeout / 5));
    if options.untuned {
        return config;
    }
    config
        .stream_receive_window(STREAM_WINDOW.into())
        // Room for every stream's whole window, so that a bulk stream that nobody reads never blocks rows.
        .receive_window((STREAMS * STREAM_WINDOW).into())
        .send_window(u64::from(STREAMS * STREAM_WINDOW))
        .initial_rtt(INITIAL_RTT)
        .mtu_discovery_config(Some(discovery(options.max_udp_payload)))
        .ack_frequency_config(Some(acks()));
    if let Congestion::Bounded { window_bytes } = options.congestion {
        config.congestion_controller_factory(Arc::new(BoundedWindowConfig { window_bytes }));
    }
    config
}

fn discovery(upper_bound: u16) -> MtuDiscoveryConfig {
    let mut config = MtuDiscoveryConfig::default();
    config.upper_bound(upper_bound);
    config
}

fn acks() -> AckFrequencyConfig {
    let mut config = AckFrequencyConfig::default();
    config.max_ack_delay(Some(MAX_ACK_DELAY)).ack_eliciting_threshold(ACK_THRESHOLD.into());
    config
}
