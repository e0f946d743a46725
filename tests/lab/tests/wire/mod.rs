//! Sockets of the test's own in the network namespaces of pods and machines: sizes to the byte, and sources that lie.
//!
//! They are outside of the nodes' cgroups: no socket hook sees them, only the hooks of devices.
#![allow(dead_code, reason = "each test file uses its part")]

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use keelway_lab::Host;
use keelway_lab::standalone::{Pod, Standalone};
use nix::sched::{CloneFlags, setns};
use rustix::net::sockopt::{self, Ipv4PathMtuDiscovery, Ipv6PathMtuDiscovery};

/// Where the test's own servers listen.
pub const PORT: u16 = 9000;
/// How long an answer may take.
const WAIT: Duration = Duration::from_secs(20);

/// A network namespace, as a file of this machine.
#[derive(Clone, Debug)]
pub struct Place(PathBuf);

/// What became of a datagram that must not be fragmented.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It arrived whole and was answered.
    Answered,
    /// Its sender was told at once, or by an ICMP error, that this many bytes fit.
    TooBig(u32),
    /// Nothing came back.
    Lost,
}

impl Place {
    /// Of a pod.
    pub fn pod(s: &Standalone, pod: &Pod) -> Self {
        let netns = s.cri(pod.node).unwrap().netns(&pod.sandbox.id).unwrap().replace("/var/run/", "/run/");
        Self(s.node(pod.node).path(&netns).unwrap())
    }

    /// Of a machine.
    pub fn host(host: &Host) -> Self {
        Self(host.netns())
    }

    /// Runs `work` inside, on a thread of its own.
    pub fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let path = self.0.clone();
        let inside = thread::spawn(move || {
            enter(&path);
            work()
        });
        inside.join().expect("the thread in the namespace")
    }

    /// Runs `ip` inside.
    pub fn ip(&self, args: &str) {
        let mut argv = vec!["nsenter", "--net", "ip"];
        let net = format!("--net={}", self.0.display());
        argv[1] = &net;
        argv.extend(args.split_whitespace());
        keelway_lab::sh::run(&argv).unwrap();
    }

    /// Answers each datagram at [`PORT`] with its length, and each line with its length, until the test ends.
    pub fn serve(&self) {
        self.run(|| {
            let any = SocketAddr::from((std::net::Ipv6Addr::UNSPECIFIED, PORT));
            let udp = UdpSocket::bind(any).unwrap();
            let tcp = TcpListener::bind(any).unwrap();
            thread::spawn(move || {
                let mut buffer = vec![0; 65536];
                // An ICMP error about an answer shows here; the next question is still to come.
                while let Ok((length, from)) = udp.recv_from(&mut buffer).or_else(|_| udp.recv_from(&mut buffer)) {
                    let _ = udp.send_to(length.to_string().as_bytes(), from);
                }
            });
            thread::spawn(move || {
                for mut stream in tcp.incoming().flatten() {
                    thread::spawn(move || {
                        let length = std::io::copy(&mut stream, &mut std::io::sink()).unwrap_or(0);
                        let _ = stream.write_all(length.to_string().as_bytes());
                    });
                }
            });
        });
    }

    /// Sends one datagram of `size` bytes, IP header included, that must not be fragmented.
    pub fn send(&self, target: SocketAddr, size: usize) -> Fate {
        self.run(move || {
            let any: IpAddr = if target.is_ipv4() { [0, 0, 0, 0].into() } else { [0u16; 8].into() };
            let socket = UdpSocket::bind((any, 0)).unwrap();
            let header = if target.is_ipv4() {
                sockopt::set_ip_mtu_discover(&socket, Ipv4PathMtuDiscovery::DO).unwrap();
                20 + 8
            } else {
                sockopt::set_ipv6_mtu_discover(&socket, Ipv6PathMtuDiscovery::DO).unwrap();
                40 + 8
            };
            socket.connect(target).unwrap();
            socket.set_read_timeout(Some(WAIT)).unwrap();
            let told = || {
                let mtu = if target.is_ipv4() { sockopt::ip_mtu(&socket) } else { sockopt::ipv6_mtu(&socket) };
                Fate::TooBig(mtu.unwrap())
            };
            let too_big = |error: &std::io::Error| error.raw_os_error() == Some(nix::errno::Errno::EMSGSIZE as i32);
            match socket.send(&vec![b'x'; size - header]) {
                Err(error) if too_big(&error) => return told(),
                sent => sent.unwrap(),
            };
            let mut answer = [0; 64];
            match socket.recv(&mut answer) {
                Ok(length) => {
                    assert_eq!(std::str::from_utf8(&answer[..length]).unwrap(), (size - header).to_string());
                    Fate::Answered
                }
                Err(error) if too_big(&error) => told(),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => Fate::Lost,
                Err(error) => panic!("{target}: {error}"),
            }
        })
    }

    /// Sends `bytes` over one TCP connection; how many the other side counted, and how long it took.
    pub fn stream(&self, target: SocketAddr, bytes: usize) -> (usize, Duration) {
        self.run(move || {
            let mut stream = TcpStream::connect_timeout(&target, WAIT).unwrap();
            stream.set_read_timeout(Some(keelway_lab::sh::SOON)).unwrap();
            let start = Instant::now();
            let block = vec![b'x'; 1 << 16];
            for _ in 0..bytes / block.len() {
                stream.write_all(&block).unwrap();
            }
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            (answer.parse().unwrap_or_else(|_| panic!("{target}: {answer:?}")), start.elapsed())
        })
    }

    /// Sends datagrams from `source`, which the namespace holds, and answers whether any was answered.
    pub fn answered_from(&self, source: IpAddr, target: SocketAddr) -> bool {
        self.run(move || {
            let socket = UdpSocket::bind((source, 0)).unwrap();
            socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
            (0..3).any(|_| {
                let _ = socket.send_to(b"who", target);
                socket.recv_from(&mut [0; 64]).is_ok()
            })
        })
    }

    /// Listens at [`PORT`] plus one, on UDP; what arrives is sent to the receiver by its source.
    pub fn listen(&self) -> mpsc::Receiver<IpAddr> {
        let (sender, receiver) = mpsc::channel();
        self.run(move || {
            let socket = UdpSocket::bind((std::net::Ipv6Addr::UNSPECIFIED, PORT + 1)).unwrap();
            thread::spawn(move || {
                let mut buffer = [0; 2048];
                while let Ok((_, from)) = socket.recv_from(&mut buffer) {
                    if sender.send(from.ip().to_canonical()).is_err() {
                        return;
                    }
                }
            });
        });
        receiver
    }

    /// Sends a datagram to [`Place::listen`]'s port from `source`.
    pub fn whisper(&self, source: IpAddr, target: IpAddr) {
        self.run(move || {
            let socket = UdpSocket::bind((source, 0)).unwrap();
            let _ = socket.send_to(b"psst", (target, PORT + 1));
        });
    }

    /// Bytes and packets that a device sent.
    pub fn sent(&self, device: &str) -> (u64, u64) {
        let net = format!("--net={}", self.0.display());
        let text = keelway_lab::sh::run(&["nsenter", &net, "ip", "-j", "-s", "link", "show", "dev", device]).unwrap();
        let link: serde_json::Value = serde_json::from_str(&text).unwrap();
        let of = |what: &str| link[0]["stats64"]["tx"][what].as_u64().unwrap();
        (of("bytes"), of("packets"))
    }
}

fn enter(path: &Path) {
    let file = std::fs::File::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    setns(file, CloneFlags::CLONE_NEWNET).unwrap();
}
