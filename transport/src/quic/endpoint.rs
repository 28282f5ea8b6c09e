//! Socket and connection parameters. Each number here cures something that was measured.

use super::background::Background;
use super::congestion::{BoundedConfig, ShortQueueConfig};
use super::options::{Congestion, JUMBO_UDP_PAYLOAD, MIN_UDP_PAYLOAD, QuicOptions, is_private};
use super::socket::CappedSocket;
use super::tls::Tls;
use quinn::{
    AckFrequencyConfig, Endpoint, EndpointConfig, IdleTimeout, MtuDiscoveryConfig, TransportConfig, VarInt,
};
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

/// Streams that a connection may have before its peer is let in: control.
const FIRST_STREAMS: u32 = 1;
/// A stream may be ahead of its reader by this much. quinn ends a connection whose stream is cut into more than
/// 1024 pieces; staying under 2 * 1024 of the smallest packets means that plain loss can never do that.
const STREAM_WINDOW: u32 = 2 * 1024 * MIN_UDP_PAYLOAD as u32;
/// First guess of the round trip: a handshake packet that is lost is repeated after three of these.
const INITIAL_RTT: Duration = Duration::from_millis(50);
/// The peer acknowledges after at most this long; 25 ms, the default, would be part of every probe timeout.
const MAX_ACK_DELAY: Duration = Duration::from_millis(1);
/// So many packets may come before the next is acknowledged at once, unless one is missing: enough acknowledgements for
/// windows of a few packets, which is what keeps queues short on slow links.
pub(super) const ACK_THRESHOLD: u32 = 3;
/// The same where packets are larger than Ethernet's jumbo frames, on the loopback interface: an exchange of small
/// payloads is one packet per peer and direction there, and acknowledging every second one is half as many again.
pub(super) const ACK_THRESHOLD_LARGE: u32 = 8;
/// Handshakes under way at once, from anybody.
const MAX_INCOMING: usize = 256;

/// An endpoint with both sides of a rank's configuration.
pub(crate) struct Bound {
    pub(crate) endpoint: Endpoint,
    pub(crate) address: SocketAddr,
    /// The bulk of this process.
    pub(crate) background: Background,
    /// For peers on private networks.
    private: Sides,
    /// For all others.
    public: Sides,
}

/// How connections are made, from either side.
struct Sides {
    client: quinn::ClientConfig,
    server: Arc<quinn::ServerConfig>,
}

impl Sides {
    fn new(tls: &Tls, options: &QuicOptions, background: &Background, private: bool) -> Self {
        let transport = |incoming| Arc::new(transport(options, background, incoming, private));
        let mut server = quinn::ServerConfig::with_crypto(Arc::clone(&tls.server) as _);
        server.transport_config(transport(FIRST_STREAMS));
        server.migration(false);
        server.max_incoming(MAX_INCOMING);
        let mut client = quinn::ClientConfig::new(Arc::clone(&tls.client) as _);
        client.transport_config(transport(0));
        Self { client, server: Arc::new(server) }
    }
}

impl Bound {
    fn sides(&self, peer: &SocketAddr) -> &Sides {
        if is_private(peer) { &self.private } else { &self.public }
    }

    /// How to dial this peer.
    pub(crate) fn client(&self, peer: &SocketAddr) -> quinn::ClientConfig {
        self.sides(peer).client.clone()
    }

    /// How to take connections, by whether the peer is on a private network.
    pub(crate) fn servers(&self) -> Servers {
        Servers { private: Arc::clone(&self.private.server), public: Arc::clone(&self.public.server) }
    }
}

/// How to take connections.
#[derive(Debug, Clone)]
pub(crate) struct Servers {
    private: Arc<quinn::ServerConfig>,
    public: Arc<quinn::ServerConfig>,
}

impl Servers {
    /// From this peer.
    pub(crate) fn of(&self, peer: &SocketAddr) -> Arc<quinn::ServerConfig> {
        Arc::clone(if is_private(peer) { &self.private } else { &self.public })
    }
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
    let background = Background::new();
    let [private, public] = [true, false].map(|private| Sides::new(tls, options, &background, private));
    let runtime = Arc::new(quinn::TokioRuntime);
    let socket = CappedSocket::wrap(socket, options.max_udp_payload, options.link)?;
    let server = quinn::ServerConfig::clone(&public.server);
    let endpoint = Endpoint::new_with_abstract_socket(config, Some(server), socket, runtime)?;
    Ok(Bound { endpoint, address, background, private, public })
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

fn transport(
    options: &QuicOptions,
    background: &Background,
    incoming_streams: u32,
    private: bool,
) -> TransportConfig {
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
        // More once a peer is let in: see [`make_room`].
        .receive_window((FIRST_STREAMS * STREAM_WINDOW).into())
        .initial_rtt(INITIAL_RTT)
        .mtu_discovery_config(Some(discovery(options.max_udp_payload)))
        .ack_frequency_config(Some(acks(options.max_udp_payload)));
    match options.congestion {
        Congestion::Bounded { window_bytes } => {
            config.congestion_controller_factory(Arc::new(BoundedConfig { window_bytes }));
        }
        Congestion::ShortQueue { most_bytes } if private => {
            let background = background.clone();
            config.congestion_controller_factory(Arc::new(ShortQueueConfig { most_bytes, background }));
        }
        Congestion::ShortQueue { .. } | Congestion::Cubic => {}
    }
    config
}

/// Makes room for every stream's whole window, so that a bulk stream that nobody reads never blocks rows.
pub(crate) fn make_room(connection: &quinn::Connection, streams: u32) {
    let bytes = u64::from(streams) * u64::from(STREAM_WINDOW);
    connection.set_receive_window(VarInt::from_u64(bytes).unwrap_or(VarInt::MAX));
    connection.set_send_window(bytes);
}

fn discovery(upper_bound: u16) -> MtuDiscoveryConfig {
    let mut config = MtuDiscoveryConfig::default();
    config.upper_bound(upper_bound);
    config
}

fn acks(largest: u16) -> AckFrequencyConfig {
    let threshold = if largest > JUMBO_UDP_PAYLOAD { ACK_THRESHOLD_LARGE } else { ACK_THRESHOLD };
    let mut config = AckFrequencyConfig::default();
    config.max_ack_delay(Some(MAX_ACK_DELAY)).ack_eliciting_threshold(threshold.into());
    config
}
