//! The stack of every program, counted as Linux 6.1's verifier counts it: the frames of a chain of calls, each rounded up to 32
//! bytes, within 512 (kernel/bpf/verifier.c, `check_max_stack_depth`). Later kernels round less, so that what is too deep would be
//! found out only there.

use std::collections::{BTreeMap, BTreeSet};

use object::{Object as _, ObjectSection as _, ObjectSymbol as _, RelocationTarget, SectionIndex, SymbolKind};

const MAX_STACK: u32 = 512;
const MAX_FRAMES: usize = 8;

/// A section's index, and an address in it in bytes.
type Place = (usize, u64);

#[derive(Default)]
struct Function {
    name: String,
    frame: u32,
    calls: BTreeSet<Place>,
}

/// One instruction (Documentation/bpf/standardization/instruction-set.rst).
struct Instruction {
    code: u8,
    dst: u8,
    src: u8,
    offset: i16,
    imm: i32,
}

impl Instruction {
    fn read(bytes: &[u8]) -> Self {
        Self {
            code: bytes[0],
            dst: bytes[1] & 15,
            src: bytes[1] >> 4,
            offset: i16::from_le_bytes([bytes[2], bytes[3]]),
            imm: i32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]),
        }
    }

    /// How deep it reaches into its frame, in bytes. A small number taken from any register is taken for the frame's: rather too
    /// much than too little.
    fn reaches(&self) -> u32 {
        const FRAME: u8 = 10;
        const ADD64_IMM: u8 = 0x07;
        let (ld, st) = (self.code & 7 == 1, matches!(self.code & 7, 2 | 3));
        if (ld && self.src == FRAME) || (st && self.dst == FRAME) {
            u32::from(self.offset.min(0).unsigned_abs())
        } else if self.code == ADD64_IMM && (-(MAX_STACK as i32)..0).contains(&self.imm) {
            self.imm.unsigned_abs()
        } else {
            0
        }
    }

    fn is_call_of_ours(&self) -> bool {
        const CALL: u8 = 0x85;
        const PSEUDO_CALL: u8 = 1;
        self.code == CALL && self.src == PSEUDO_CALL
    }
}

fn functions(file: &object::File<'_>) -> BTreeMap<Place, Function> {
    let mut functions = BTreeMap::new();
    for symbol in file.symbols().filter(|symbol| symbol.kind() == SymbolKind::Text) {
        let Some(section) = symbol.section_index() else { continue };
        let data = file.section_by_index(section).unwrap().data().unwrap();
        let section = section.0;
        let start = symbol.address();
        let body = &data[start as usize..(start + symbol.size()) as usize];
        let mut function = Function { name: symbol.name().unwrap().to_owned(), ..Function::default() };
        for (at, bytes) in (start..).step_by(8).zip(body.chunks_exact(8)) {
            let instruction = Instruction::read(bytes);
            function.frame = function.frame.max(instruction.reaches());
            if instruction.is_call_of_ours() {
                function.calls.insert(callee(file, (section, at), &instruction));
            }
        }
        functions.insert((section, start), function);
    }
    functions
}

fn callee(file: &object::File<'_>, at: Place, call: &Instruction) -> Place {
    let section = file.section_by_index(SectionIndex(at.0)).unwrap();
    let relocation =
        section.relocations().find(|(offset, _)| *offset == at.1).map(|(_, relocation)| relocation.target());
    let ahead = |base: u64| base.wrapping_add_signed(i64::from(call.imm) * 8 + 8);
    match relocation {
        None => (at.0, ahead(at.1)),
        Some(RelocationTarget::Symbol(index)) => {
            let symbol = file.symbol_by_index(index).unwrap();
            let to = symbol.section_index().unwrap().0;
            (to, if symbol.kind() == SymbolKind::Section { ahead(0) } else { symbol.address() })
        }
        Some(other) => panic!("a call to {other:?}"),
    }
}

/// The deepest chain from a function on: its bytes, and the names on it.
fn deepest(functions: &BTreeMap<Place, Function>, from: Place) -> (u32, Vec<String>) {
    let function = functions.get(&from).unwrap_or_else(|| panic!("a call to no function: {from:?}"));
    let below = function.calls.iter().map(|call| deepest(functions, *call)).max().unwrap_or_default();
    let mut chain = vec![format!("{} ({})", function.name, function.frame)];
    chain.extend(below.1);
    (function.frame.max(1).next_multiple_of(32) + below.0, chain)
}

#[test]
#[cfg_attr(no_programs, ignore = "built without the kernel side: hack/setup build")]
fn every_chain_of_calls_fits_in_the_stack_of_linux_6_1() {
    let object = include_bytes!(concat!(env!("OUT_DIR"), "/keelway.bpf.o"));
    let file = object::File::parse(object.as_slice()).unwrap();
    let functions = functions(&file);
    let programs: Vec<_> = functions.iter().filter(|(_, function)| function.name.ends_with("_work")).collect();
    assert_eq!(programs.len(), 17, "a program a hook");
    assert!(programs.iter().any(|(_, function)| !function.calls.is_empty()), "calls are found");
    for (place, program) in programs {
        let (bytes, chain) = deepest(&functions, *place);
        println!("{bytes:4} {}", program.name);
        assert!(bytes <= MAX_STACK, "{bytes} bytes: {}", chain.join(" > "));
        assert!(chain.len() <= MAX_FRAMES, "{} frames: {}", chain.len(), chain.join(" > "));
    }
}
