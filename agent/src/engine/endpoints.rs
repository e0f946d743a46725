//! Local pods: which are leased, which are attached, and under whose rules.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{BuildHasher as _, RandomState};
use std::net::IpAddr;

use keelway_cni::plan::Plan;
use keelway_cni::{Lease, LeaseKey};
use keelway_layout::{Addr, Endpoint, NetnsPod, endpoint_flags};
use keelway_maps::{Table as _, TableError, Tables};
use keelway_policy as policy;
use keelway_policy::model::ObjectName;

use super::{Engine, EngineError};

/// An attached pod, as its endpoint entry needs it.
#[derive(Clone, Debug)]
pub struct Attached {
    /// The lease.
    pub lease: Lease,
    /// Name of the host's end of the pair.
    pub host_ifname: String,
    /// Its index.
    pub ifindex: u32,
    /// Hardware address of the pod's end.
    pub mac: [u8; 6],
    /// Hardware address of the host's end.
    pub host_mac: [u8; 6],
    /// Cookie of its network namespace.
    pub netns_cookie: u64,
}

struct Record {
    lease: Lease,
    /// What its entries hold; `None` until it is attached.
    entry: Option<Endpoint>,
    host_ifname: String,
    /// Of its network namespace; 0 when not known.
    netns_cookie: u64,
}

/// All of them. Entries of the map are written here only.
pub struct Endpoints {
    records: BTreeMap<LeaseKey, Record>,
    policies: BTreeMap<String, policy::EndpointPolicy>,
    next_id: u32,
    next_incarnation: u32,
}

const fn flags(policy: &policy::EndpointPolicy) -> u32 {
    let mut flags = 0;
    if policy.enforce_ingress {
        flags |= endpoint_flags::ENFORCE_INGRESS;
    }
    if policy.enforce_egress {
        flags |= endpoint_flags::ENFORCE_EGRESS;
    }
    flags
}

fn write(record: &Record, tables: &mut Tables) -> Result<(), TableError> {
    let Some(entry) = &record.entry else { return Ok(()) };
    for address in &record.lease.addresses {
        tables.endpoints.put(&(*address).into(), entry)?;
    }
    if record.netns_cookie != 0 {
        tables.netns.put(&record.netns_cookie, &netns_pod(&record.lease, entry))?;
    }
    Ok(())
}

/// Where this start of the agent begins to count. Flows outlive their pods in the tables, and the one that had the highest number
/// may be gone, so that what the endpoints hold does not say which numbers were given: each start begins somewhere else.
fn first_incarnation() -> u32 {
    (RandomState::new().hash_one(std::process::id()) as u32).max(1)
}

/// What socket hooks are to know of a pod.
fn netns_pod(lease: &Lease, entry: &Endpoint) -> NetnsPod {
    let of_family = |is_family: fn(&IpAddr) -> bool| {
        lease.addresses.iter().copied().find(is_family).map_or(Addr::UNSPECIFIED, Addr::from)
    };
    NetnsPod { v4: of_family(IpAddr::is_ipv4), v6: of_family(IpAddr::is_ipv6), endpoint: entry.id, reserved: 0 }
}

impl Endpoints {
    /// From what was leased and what the map still holds: after a restart of the agent all of it, after one of the node nothing.
    pub fn restore(leases: Vec<Lease>, tables: &Tables) -> Result<Self, TableError> {
        let entries: BTreeMap<_, _> = tables.endpoints.dump()?.into_iter().collect();
        let next_id = entries.values().map(|entry| entry.id).max().unwrap_or(0) + 1;
        let next_incarnation = first_incarnation();
        let cookies: BTreeMap<u32, u64> =
            tables.netns.dump()?.into_iter().map(|(cookie, pod)| (pod.endpoint, cookie)).collect();
        let records = leases
            .into_iter()
            .map(|lease| {
                let entry = lease.addresses.iter().find_map(|address| entries.get(&(*address).into())).copied();
                let host_ifname = Plan::new(&lease, &[]).host_ifname;
                let netns_cookie = entry.and_then(|entry| cookies.get(&entry.id).copied()).unwrap_or(0);
                (lease.key.clone(), Record { lease, entry, host_ifname, netns_cookie })
            })
            .collect();
        Ok(Self { records, policies: BTreeMap::new(), next_id, next_incarnation })
    }

    /// What the policy model is to know: one endpoint a pod, with the addresses of all its leases.
    pub fn wanted(&self) -> Vec<policy::model::Endpoint> {
        let mut by_uid: BTreeMap<&str, policy::model::Endpoint> = BTreeMap::new();
        for record in self.records.values() {
            let pod = &record.lease.pod;
            let endpoint = by_uid.entry(&pod.uid).or_insert_with(|| policy::model::Endpoint {
                pod: ObjectName::new(pod.namespace.clone(), pod.name.clone()),
                uid: pod.uid.clone(),
                addresses: Vec::new(),
            });
            endpoint.addresses.extend(&record.lease.addresses);
        }
        by_uid.into_values().collect()
    }

    fn wanted_of(&self, uid: &str) -> Option<policy::model::Endpoint> {
        self.wanted().into_iter().find(|endpoint| endpoint.uid == uid)
    }

    /// A pod's subject or enforcement changed.
    pub fn set_policy(&mut self, policy: policy::EndpointPolicy, tables: &mut Tables) -> Result<(), TableError> {
        for record in self.records.values_mut().filter(|record| record.lease.pod.uid == policy.uid) {
            if let Some(entry) = &mut record.entry {
                entry.subject = policy.subject;
                entry.flags = flags(&policy);
                entry.policy_generation = entry.policy_generation.wrapping_add(1);
            }
            write(record, tables)?;
        }
        self.policies.insert(policy.uid.clone(), policy);
        Ok(())
    }

    pub fn forget_policy(&mut self, uid: &str) {
        self.policies.remove(uid);
    }

    /// The flows of a subject's endpoints are to be judged again.
    pub fn bump(&mut self, subject: u32, tables: &mut Tables) -> Result<(), TableError> {
        for record in self.records.values_mut() {
            if let Some(entry) = record.entry.as_mut().filter(|entry| entry.subject == subject) {
                entry.policy_generation = entry.policy_generation.wrapping_add(1);
                write(record, tables)?;
            }
        }
        Ok(())
    }

    /// How many are attached.
    pub fn attached(&self) -> usize {
        self.records.values().filter(|record| record.entry.is_some()).count()
    }

    /// Entries of the map.
    pub fn entries(&self) -> usize {
        let attached = self.records.values().filter(|record| record.entry.is_some());
        attached.flat_map(|record| &record.lease.addresses).collect::<BTreeSet<_>>().len()
    }

    fn addresses(&self) -> Vec<IpAddr> {
        self.records.values().flat_map(|record| record.lease.addresses.iter().copied()).collect()
    }
}

impl Engine {
    pub(super) fn prepare(&mut self, lease: Lease) -> Result<(), EngineError> {
        if !self.is_synced() {
            return Err(EngineError::NotSynced);
        }
        let (key, uid) = (lease.key.clone(), lease.pod.uid.clone());
        let host_ifname = Plan::new(&lease, &[]).host_ifname;
        self.endpoints.records.insert(key, Record { lease, entry: None, host_ifname, netns_cookie: 0 });
        if let Some(endpoint) = self.endpoints.wanted_of(&uid) {
            self.policies.model.upsert_endpoint(endpoint);
        }
        self.apply_now()
    }

    pub(super) fn attach_endpoint(&mut self, attached: Attached) -> Result<(), EngineError> {
        let kernel = |error: &dyn std::fmt::Display| EngineError::Kernel(error.to_string());
        let uid = &attached.lease.pod.uid;
        let Some(policy) = self.endpoints.policies.get(uid) else {
            return Err(EngineError::Kernel(format!("no policy has been worked out for the pod with uid {uid}")));
        };
        let entry = Endpoint {
            ifindex: attached.ifindex,
            id: self.endpoints.next_id,
            incarnation: self.endpoints.next_incarnation,
            subject: policy.subject,
            policy_generation: 1,
            flags: flags(policy),
            mac: attached.mac,
            host_mac: attached.host_mac,
            reserved: 0,
        };
        self.endpoints.next_id = self.endpoints.next_id.wrapping_add(1).max(1);
        self.endpoints.next_incarnation = self.endpoints.next_incarnation.wrapping_add(1).max(1);
        self.datapath.attach_pod(&attached.host_ifname).map_err(|error| kernel(&error))?;
        let record = Record {
            entry: Some(entry),
            host_ifname: attached.host_ifname,
            lease: attached.lease,
            netns_cookie: attached.netns_cookie,
        };
        let written = write(&record, &mut self.datapath.tables);
        self.endpoints.records.insert(record.lease.key.clone(), record);
        written.map_err(|error| kernel(&error))
    }

    pub(super) fn detach_endpoint(&mut self, key: &LeaseKey, host_ifname: &str) -> Result<(), EngineError> {
        let kernel = |error: &dyn std::fmt::Display| EngineError::Kernel(error.to_string());
        let Some(record) = self.endpoints.records.remove(key) else {
            return self.datapath.forget_device(host_ifname).map_err(|error| kernel(&error));
        };
        // Another sandbox may have been given the address since; then the entry is its own.
        let taken = self.endpoints.addresses();
        for address in record.lease.addresses.iter().filter(|address| !taken.contains(address)) {
            self.datapath.tables.endpoints.delete(&(*address).into()).map_err(|error| kernel(&error))?;
        }
        let shared = self.endpoints.records.values().any(|other| other.netns_cookie == record.netns_cookie);
        if record.netns_cookie != 0 && !shared {
            self.datapath.tables.netns.delete(&record.netns_cookie).map_err(|error| kernel(&error))?;
        }
        let uid = &record.lease.pod.uid;
        match self.endpoints.wanted_of(uid) {
            Some(endpoint) => self.policies.model.upsert_endpoint(endpoint),
            None => self.policies.model.delete_endpoint(uid),
        }
        self.datapath.forget_device(&record.host_ifname).map_err(|error| kernel(&error))?;
        if self.is_synced() { self.apply_now() } else { Ok(()) }
    }

    fn apply_now(&mut self) -> Result<(), EngineError> {
        if let Some(problem) = self.problems.get("tables").filter(|_| self.retry_at.is_some()) {
            return Err(EngineError::Kernel(problem.clone()));
        }
        let result = self.apply();
        self.settle(result.clone());
        result
    }

    /// After a start: programs of pods whose links are still there stay; what lost them gets them again; pins of devices that
    /// are gone are removed.
    pub(super) fn reattach_pods(&mut self) -> Result<(), keelway_maps::Error> {
        let mut wanted = Vec::new();
        for record in self.endpoints.records.values_mut() {
            match nix::net::if_::if_nametoindex(record.host_ifname.as_str()) {
                Ok(index) if record.entry.as_ref().is_some_and(|entry| entry.ifindex == index) => {
                    wanted.push(record.host_ifname.clone());
                }
                // The node was started anew: the pair is gone, the lease stays until the runtime says DEL or GC.
                _ => record.entry = None,
            }
        }
        for device in self.datapath.pinned_devices() {
            let ours = device.starts_with(keelway_cni::plan::HOST_PREFIX);
            if ours && !wanted.contains(&device) {
                self.datapath.forget_device(&device)?;
            }
        }
        for device in wanted {
            self.datapath.attach_pod(&device)?;
        }
        let live: Vec<IpAddr> = self
            .endpoints
            .records
            .values()
            .filter(|record| record.entry.is_some())
            .flat_map(|record| record.lease.addresses.iter().copied())
            .collect();
        for (address, _) in self.datapath.tables.endpoints.dump()? {
            if !live.contains(&IpAddr::from(address)) {
                self.datapath.tables.endpoints.delete(&address)?;
            }
        }
        let records = self.endpoints.records.values();
        let cookies: Vec<u64> = records.filter(|record| record.entry.is_some()).map(|r| r.netns_cookie).collect();
        for (cookie, _) in self.datapath.tables.netns.dump()? {
            if !cookies.contains(&cookie) {
                self.datapath.tables.netns.delete(&cookie)?;
            }
        }
        Ok(())
    }

    pub(super) fn verify_endpoint(&self, key: &LeaseKey) -> Vec<String> {
        let Some(record) = self.endpoints.records.get(key) else {
            return vec![format!("no endpoint is known for {key}")];
        };
        let mut missing = Vec::new();
        for address in &record.lease.addresses {
            match self.datapath.tables.endpoints.get(&(*address).into()) {
                Ok(found) if found.is_some() && found == record.entry => {}
                Ok(Some(_)) => missing.push(format!("the endpoint entry of {address} is another's")),
                Ok(None) => missing.push(format!("no endpoint entry for {address}")),
                Err(error) => missing.push(error.to_string()),
            }
        }
        let alive = self.datapath.hooks().iter().filter(|hook| hook.to == record.host_ifname && hook.alive).count();
        if alive != 2 {
            missing.push(format!("{alive} of 2 programs are attached to {}", record.host_ifname));
        }
        missing
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_start_counts_incarnations_from_where_another_did() {
        let starts: BTreeSet<u32> = (0..100).map(|_| first_incarnation()).collect();
        assert_eq!(starts.len(), 100);
        assert!(!starts.contains(&0), "that is nobody's");
    }
}
