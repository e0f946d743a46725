//! A bpffs of a test's own, and packets by hand.
#![allow(dead_code)]

use std::net::Ipv4Addr;
use std::path::Path;

use keelway_layout::{Addr, Backend, Endpoint, Frontend, FrontendKey, NodeConfig, Port, SlotKey};
use keelway_maps::{Table, Tables};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// A bpffs of the test's own, gone with it.
pub struct Bpffs(tempfile::TempDir);

impl Bpffs {
    pub fn new() -> Self {
        assert!(nix::unistd::geteuid().is_root(), "these tests load BPF programs and need root");
        let dir = tempfile::tempdir().unwrap();
        mount(Some("bpf"), dir.path(), Some("bpf"), MsFlags::empty(), None::<&str>).unwrap();
        Self(dir)
    }
    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Bpffs {
    fn drop(&mut self) {
        let _ = umount2(self.0.path(), MntFlags::MNT_DETACH);
    }
}

const CLIENT: [u8; 4] = [10, 244, 1, 2];
/// Index of the loopback device, by which a run's packet comes.
const LOOPBACK: u32 = 1;

pub fn v4(octets: [u8; 4]) -> Addr {
    Ipv4Addr::from(octets).into()
}

/// The pod that sends.
pub fn client() -> Addr {
    v4(CLIENT)
}

/// A pod behind the loopback device, and a Service with eight backends elsewhere; where it is dialled.
pub fn pod_and_service(tables: &mut Tables) -> (Addr, Port) {
    tables.set_node(&NodeConfig::default()).unwrap();
    let pod = Endpoint { ifindex: LOOPBACK, id: 1, incarnation: 1, ..Endpoint::default() };
    tables.endpoints.put(&client(), &pod).unwrap();
    for slot in 0..8_u8 {
        let backend =
            Backend { addr: v4([192, 0, 2, slot + 1]), port: Port::new(8080), proto: 6, ..Backend::default() };
        tables.backends.put(&(u32::from(slot) + 1), &backend).unwrap();
        let key = SlotKey { frontend: 1, slot: slot.into() };
        tables.slots.put(&key, &(u32::from(slot) + 1)).unwrap();
    }
    let frontend = (v4([10, 96, 0, 1]), Port::new(80));
    let value = Frontend { id: 1, count: 8, ..Frontend::default() };
    tables.frontends.put(&FrontendKey::new(frontend.0, frontend.1, 6), &value).unwrap();
    frontend
}

/// A SYN of the pod to the Service.
pub fn service_packet(sport: u16, (addr, port): (Addr, Port)) -> Vec<u8> {
    let mut packet = vec![0; 54];
    packet[12..14].copy_from_slice(&[8, 0]);
    packet[14..18].copy_from_slice(&[0x45, 0, 0, 40]);
    packet[22..24].copy_from_slice(&[64, 6]);
    packet[26..30].copy_from_slice(&CLIENT);
    packet[30..34].copy_from_slice(&addr.octets()[12..]);
    packet[34..36].copy_from_slice(&sport.to_be_bytes());
    packet[36..38].copy_from_slice(&port.get().to_be_bytes());
    // Five words of header, SYN.
    packet[46..48].copy_from_slice(&[0x50, 2]);
    packet
}
