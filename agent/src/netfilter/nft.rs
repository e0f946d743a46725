//! nftables' tables, chains and rules (`<linux/netfilter/nf_tables.h>`); iptables' usual back end keeps its rules there too.

use super::message::{Attributes, Request, attribute, nest};
use super::{FLAG_CREATE, IPV4, IPV6, Refused, batch, dump};

const SUBSYSTEM: u16 = 10;
const NEW_TABLE: u16 = 0;
const GET_TABLE: u16 = 1;
const DELETE_TABLE: u16 = 2;
const NEW_CHAIN: u16 = 3;
const GET_CHAIN: u16 = 4;
const DELETE_CHAIN: u16 = 5;
const NEW_RULE: u16 = 6;
const GET_RULE: u16 = 7;
const DELETE_RULE: u16 = 8;

const TABLE_NAME: u16 = 1;
const CHAIN_TABLE: u16 = 1;
const CHAIN_NAME: u16 = 3;
const CHAIN_HOOK: u16 = 4;
const CHAIN_TYPE: u16 = 7;
const RULE_TABLE: u16 = 1;
const RULE_CHAIN: u16 = 2;
const RULE_HANDLE: u16 = 3;
const RULE_EXPRESSIONS: u16 = 4;
const LIST_ELEMENT: u16 = 1;
const EXPRESSION_NAME: u16 = 1;
const EXPRESSION_DATA: u16 = 2;
const IMMEDIATE_DATA: u16 = 2;
const DATA_VERDICT: u16 = 2;
const VERDICT_CHAIN: u16 = 2;
/// Changes in one batch: its answers have to fit into a socket's buffer should all of them fail.
const CHANGES: usize = 200;

/// Holds the hooks by which the kernel translates known connections.
pub const HOLDING_TABLE: &str = "keelway-adopted";

/// A table of a family.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Table {
    /// As in nfnetlink's header.
    pub family: u8,
    /// Its name.
    pub name: String,
}

/// A chain.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Chain {
    /// Its table.
    pub table: Table,
    /// Its name.
    pub name: String,
    /// Packets get there by a hook.
    pub is_base: bool,
}

/// A rule that leads to another chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Jump {
    /// Its table.
    pub table: Table,
    /// Its chain.
    pub chain: String,
    /// Its number.
    pub handle: u64,
    /// Where it leads.
    pub target: String,
}

/// All tables.
///
/// # Errors
/// What the kernel says; also that it has no nftables.
pub fn tables() -> Result<Vec<Table>, Refused> {
    let read = |family, attributes: Attributes<'_>| Some(Table { family, name: attributes.name(TABLE_NAME)? });
    dump("nftables", Request::new(SUBSYSTEM, GET_TABLE, 0), SUBSYSTEM << 8 | NEW_TABLE, read)
}

/// All chains.
///
/// # Errors
/// As [`tables`].
pub fn chains() -> Result<Vec<Chain>, Refused> {
    let read = |family, attributes: Attributes<'_>| {
        let table = Table { family, name: attributes.name(CHAIN_TABLE)? };
        Some(Chain { table, name: attributes.name(CHAIN_NAME)?, is_base: attributes.get(CHAIN_HOOK).is_some() })
    };
    dump("nftables", Request::new(SUBSYSTEM, GET_CHAIN, 0), SUBSYSTEM << 8 | NEW_CHAIN, read)
}

/// All rules that jump or go to a chain without a look into a map.
///
/// # Errors
/// As [`tables`].
pub fn jumps() -> Result<Vec<Jump>, Refused> {
    let read = |family, attributes: Attributes<'_>| {
        let expressions = attributes.nested(RULE_EXPRESSIONS)?;
        Some(Jump {
            table: Table { family, name: attributes.name(RULE_TABLE)? },
            chain: attributes.name(RULE_CHAIN)?,
            handle: attributes.be64(RULE_HANDLE)?,
            target: expressions.into_iter().find_map(|(_, payload)| target(payload))?,
        })
    };
    dump("nftables", Request::new(SUBSYSTEM, GET_RULE, 0), SUBSYSTEM << 8 | NEW_RULE, read)
}

fn target(expression: &[u8]) -> Option<String> {
    let expression = Attributes::of(expression);
    if expression.name(EXPRESSION_NAME)? != "immediate" {
        return None;
    }
    let data = expression.nested(EXPRESSION_DATA)?.nested(IMMEDIATE_DATA)?;
    data.nested(DATA_VERDICT)?.name(VERDICT_CHAIN)
}

/// Removes a table with all that is in it.
///
/// # Errors
/// What the kernel says.
pub fn delete_table(table: &Table) -> Result<(), Refused> {
    let request = Request::new(SUBSYSTEM, DELETE_TABLE, table.family).with_name(TABLE_NAME, &table.name);
    batch("nftables", SUBSYSTEM, &[(request, 0)])
}

/// Removes rules by number.
///
/// # Errors
/// What the kernel says.
pub fn delete_jumps(jumps: &[&Jump]) -> Result<(), Refused> {
    each(jumps, |jump| {
        Request::new(SUBSYSTEM, DELETE_RULE, jump.table.family)
            .with_name(RULE_TABLE, &jump.table.name)
            .with_name(RULE_CHAIN, &jump.chain)
            .with(RULE_HANDLE, &jump.handle.to_be_bytes())
    })
}

/// Empties chains, which may lead to each other, and removes them.
///
/// # Errors
/// What the kernel says.
pub fn delete_chains(chains: &[&Chain]) -> Result<(), Refused> {
    each(chains, |chain| {
        Request::new(SUBSYSTEM, DELETE_RULE, chain.table.family)
            .with_name(RULE_TABLE, &chain.table.name)
            .with_name(RULE_CHAIN, &chain.name)
    })?;
    each(chains, |chain| {
        Request::new(SUBSYSTEM, DELETE_CHAIN, chain.table.family)
            .with_name(CHAIN_TABLE, &chain.table.name)
            .with_name(CHAIN_NAME, &chain.name)
    })
}

fn each<T>(all: &[T], request: impl Fn(&T) -> Request) -> Result<(), Refused> {
    for some in all.chunks(CHANGES) {
        let requests: Vec<_> = some.iter().map(|one| (request(one), 0)).collect();
        batch("nftables", SUBSYSTEM, &requests)?;
    }
    Ok(())
}

/// Keeps the kernel translating the connections that it knows when the rules that began them go.
///
/// It does so in hooks that are there while a chain of type `nat` is (`nf_nat_register_fn`), and only for packets that its
/// tracking has seen, whose hooks are there while a rule asks for it (`nf_ct_netns_get`). Both go with a kube-proxy's table.
///
/// # Errors
/// What the kernel says.
pub fn hold_translation() -> Result<(), Refused> {
    // Number and priority of `<linux/netfilter.h>`, `<linux/netfilter_ipv4.h>`: NF_IP_PRI_NAT_DST, NF_IP_PRI_NAT_SRC.
    let hooks = [("prerouting", 0_u32, -100_i32), ("input", 1, 100), ("output", 3, -100), ("postrouting", 4, 100)];
    for family in [IPV4, IPV6] {
        if tables()?.contains(&Table { family, name: HOLDING_TABLE.into() }) {
            continue;
        }
        let mut requests =
            vec![(Request::new(SUBSYSTEM, NEW_TABLE, family).with_name(TABLE_NAME, HOLDING_TABLE), FLAG_CREATE)];
        for (name, number, priority) in hooks {
            let hook = [attribute(1, &number.to_be_bytes()), attribute(2, &priority.to_be_bytes())].concat();
            let request = Request::new(SUBSYSTEM, NEW_CHAIN, family)
                .with_name(CHAIN_TABLE, HOLDING_TABLE)
                .with_name(CHAIN_NAME, name)
                .with_nest(CHAIN_HOOK, &hook)
                .with_name(CHAIN_TYPE, "nat");
            requests.push((request, FLAG_CREATE));
        }
        // `ct state`, into the first register, for nobody.
        let load = [attribute(1, &1_u32.to_be_bytes()), attribute(2, &0_u32.to_be_bytes())].concat();
        let expression = [attribute(EXPRESSION_NAME, b"ct\0"), nest(EXPRESSION_DATA, &load)].concat();
        let rule = Request::new(SUBSYSTEM, NEW_RULE, family)
            .with_name(RULE_TABLE, HOLDING_TABLE)
            .with_name(RULE_CHAIN, "prerouting")
            .with_nest(RULE_EXPRESSIONS, &nest(LIST_ELEMENT, &expression));
        requests.push((rule, FLAG_CREATE | 0x800));
        batch("nftables", SUBSYSTEM, &requests)?;
    }
    Ok(())
}

/// Ends what [`hold_translation`] began; whether there was any.
///
/// # Errors
/// What the kernel says.
pub fn release_translation() -> Result<bool, Refused> {
    let held: Vec<Table> = tables()?.into_iter().filter(|table| table.name == HOLDING_TABLE).collect();
    held.iter().try_for_each(delete_table)?;
    Ok(!held.is_empty())
}
