//! Numbers for names, kept over restarts by lines that the agent persists.

use std::collections::{BTreeMap, BTreeSet};

/// Gives each name in use a number of its own. A name that is no longer used keeps its number until the next
/// [`sweep`](Self::sweep), so that one that goes and comes back between two writes stays what it was. Numbers are not
/// reused soon: each new one is the next free after the last.
#[derive(Clone, Debug)]
pub(crate) struct Numbering {
    /// What its lines start with, after `+` or `-`.
    tag: char,
    first: u32,
    last: u32,
    max: u32,
    names: BTreeMap<u32, (String, usize)>,
    numbers: BTreeMap<String, u32>,
    idle: BTreeSet<u32>,
    /// Lines not yet handed out.
    journal: Vec<String>,
}

impl Numbering {
    pub fn new(tag: char, first: u32, max: u32) -> Self {
        Self {
            tag,
            first,
            last: first - 1,
            max,
            names: BTreeMap::new(),
            numbers: BTreeMap::new(),
            idle: BTreeSet::new(),
            journal: Vec::new(),
        }
    }

    /// The number of a name, new if need be; each call is to be matched by one of [`unref`](Self::unref).
    pub fn acquire(&mut self, name: &str) -> u32 {
        let number = match self.numbers.get(name) {
            Some(number) => *number,
            None => self.add(name),
        };
        if let Some((_, refs)) = self.names.get_mut(&number) {
            *refs += 1;
        }
        self.idle.remove(&number);
        number
    }

    fn add(&mut self, name: &str) -> u32 {
        loop {
            self.last = if self.last >= self.max { self.first } else { self.last + 1 };
            if !self.names.contains_key(&self.last) {
                break;
            }
        }
        self.journal.push(self.line('+', self.last, name));
        self.insert(self.last, name);
        self.last
    }

    fn insert(&mut self, number: u32, name: &str) {
        self.names.insert(number, (name.to_owned(), 0));
        self.numbers.insert(name.to_owned(), number);
        self.idle.insert(number);
    }

    pub fn unref(&mut self, number: u32) {
        if let Some((_, refs)) = self.names.get_mut(&number) {
            *refs -= 1;
            if *refs == 0 {
                self.idle.insert(number);
            }
        }
    }

    /// Forgets the names that are not in use and returns their numbers.
    pub fn sweep(&mut self) -> BTreeSet<u32> {
        let idle = std::mem::take(&mut self.idle);
        for number in &idle {
            if let Some((name, _)) = self.names.remove(number) {
                self.journal.push(self.line('-', *number, &name));
                self.numbers.remove(&name);
            }
        }
        idle
    }

    pub fn name(&self, number: u32) -> Option<&str> {
        self.names.get(&number).map(|(name, _)| name.as_str())
    }

    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// A number that the kernel's maps hold, whether or not a line names it: new ones come after it.
    pub fn seen(&mut self, number: u32) {
        if (self.first..=self.max).contains(&number) {
            self.last = self.last.max(number);
        }
    }

    /// Takes over one persisted line, if it is for this numbering; `None` when it does not read as one.
    pub fn replay(&mut self, line: &str) -> Option<bool> {
        let mut words = line.split(' ');
        let (Some(what), Some(number), Some(name), None) = (words.next(), words.next(), words.next(), words.next())
        else {
            return None;
        };
        let number: u32 = number.parse().ok()?;
        let (sign, tag) = (what.chars().next()?, what.chars().nth(1)?);
        if what.chars().count() != 2 || !matches!(sign, '+' | '-') {
            return None;
        }
        if tag != self.tag {
            return Some(false);
        }
        if !(self.first..=self.max).contains(&number) {
            return None;
        }
        self.seen(number);
        if let Some((old, _)) = self.names.remove(&number) {
            self.numbers.remove(&old);
            self.idle.remove(&number);
        }
        if let Some(other) = self.numbers.remove(name) {
            self.names.remove(&other);
            self.idle.remove(&other);
        }
        if sign == '+' {
            self.insert(number, name);
        }
        Some(true)
    }

    /// The lines since the last call.
    pub fn take_journal(&mut self) -> Vec<String> {
        std::mem::take(&mut self.journal)
    }

    /// All names as lines.
    pub fn lines(&self) -> impl Iterator<Item = String> {
        self.names.iter().map(|(number, (name, _))| self.line('+', *number, name))
    }

    fn line(&self, sign: char, number: u32, name: &str) -> String {
        format!("{sign}{} {number} {name}", self.tag)
    }
}

/// Writes a piece of a name such that separators, spaces and line ends cannot appear in it.
pub(crate) fn escape(piece: &str) -> String {
    let mut out = String::with_capacity(piece.len());
    for byte in piece.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'.' | b'_' | b'-' | b'/' => out.push(char::from(byte)),
            other => out.push_str(&format!("%{other:02x}")),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_survive_by_their_lines() {
        let mut numbering = Numbering::new('i', 256, 1000);
        let (a, b) = (numbering.acquire("a"), numbering.acquire("b"));
        assert_eq!((a, b), (256, 257));
        numbering.unref(a);
        assert_eq!(numbering.sweep(), BTreeSet::from([a]));
        let lines = numbering.take_journal();
        assert_eq!(lines, ["+i 256 a", "+i 257 b", "-i 256 a"]);

        let mut again = Numbering::new('i', 256, 1000);
        assert!(lines.iter().all(|line| again.replay(line) == Some(true)));
        assert_eq!(again.replay("+r 1 x"), Some(false), "another numbering's");
        assert_eq!(again.acquire("b"), b);
        assert_eq!(again.acquire("a"), 258, "a number that was given back is not the next one");
        assert_eq!(again.lines().collect::<Vec<_>>(), ["+i 257 b", "+i 258 a"]);
    }

    #[test]
    fn lines_that_do_not_read_are_refused() {
        let mut numbering = Numbering::new('i', 256, 1000);
        for line in ["", "+i", "+i 256", "+i x a", "+i 256 a b", "*i 256 a", "+ii 256 a", "+i 255 a", "+i 1001 a"] {
            assert_eq!(numbering.replay(line), None, "{line:?}");
        }
    }

    #[test]
    fn a_name_that_comes_back_at_once_keeps_its_number() {
        let mut numbering = Numbering::new('i', 1, 3);
        let a = numbering.acquire("a");
        numbering.unref(a);
        assert_eq!(numbering.acquire("a"), a);
        assert!(numbering.sweep().is_empty());
        numbering.acquire("b");
        numbering.unref(a);
        numbering.sweep();
        assert_eq!((numbering.acquire("c"), numbering.acquire("d")), (3, 1), "then it wraps to what is free");
    }

    #[test]
    fn escaping_leaves_no_separator() {
        assert_eq!(escape("app.kubernetes.io/name"), "app.kubernetes.io/name");
        assert_eq!(escape("a b\n;=,:%é"), "a%20b%0a%3b%3d%2c%3a%25%c3%a9");
    }
}
