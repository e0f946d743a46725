//! The third judge: the same Services, changed at random in place, on a node of ours and on a node with the real kube-proxy; the same
//! questions of a pod, of the node itself and of a client outside are answered by the same backends, refused or dropped alike.
mod court;
mod wish;

use std::thread;

use keelway_lab::cluster::programs::bin_dir;
use keelway_lab::sh;

use court::{Client, Court, Outcome, Question};
use wish::{Random, Wish};

const SERVICES: u16 = 12;
const ROUNDS: usize = 4;
/// How often a question is asked anew, its answers added up, before the two are said to differ.
const TRIES: usize = 4;

fn missing() -> Option<String> {
    if !bin_dir().is_ok_and(|dir| dir.join("kube-proxy").is_file()) {
        return Some("no kube-proxy: make cluster-programs".into());
    }
    sh::missing(&["ip", "busybox", "nft"], &["keelway-agent", "keelway-cni", "keelway", "keelway-probe"])
}

/// Whether the two saw the same. Of a Service with affinity a client knows one backend, which is its proxy's choice; a datagram from
/// a port that it used before may still be of an older flow, to another one.
fn agree(wish: &Wish, question: &Question, ours: &Outcome, peers: &Outcome) -> bool {
    if question.udp && question.client == Client::Host && ours.answers.is_empty() && peers.answers.is_empty() {
        // A datagram that the own host's packet filter takes fails with EPERM, whether it is refused or dropped.
        return true;
    }
    if wish.affinity && !ours.answers.is_empty() {
        let one = |outcome: &Outcome| outcome.answers.len() == 1 || (question.udp && !outcome.answers.is_empty());
        return one(ours) && one(peers) && ours.failures == peers.failures;
    }
    ours == peers
}

#[test]
fn kube_proxy_judges_as_we_do() {
    if let Some(reason) = missing() {
        println!("skipped: {reason}");
        return;
    }
    let seed = std::env::var("KEELWAY_SEED").ok().map_or(1, |text| text.parse().expect("KEELWAY_SEED: a number"));
    println!("KEELWAY_SEED={seed}");
    let mut random = Random(seed);
    let (mut ours, mut peers) = (Court::ours().unwrap(), Court::kube_proxys().unwrap());
    let mut wishes: Vec<Wish> = (0..SERVICES).map(|number| Wish::new(number, &mut random)).collect();
    let (mut asked, mut served, mut differ) = (0, 0, Vec::new());
    for round in 0..ROUNDS {
        for court in [&mut ours, &mut peers] {
            court.put(&wishes, round).unwrap();
        }
        for court in [&ours, &peers] {
            court.wait_programmed(round).unwrap();
        }
        let questions: Vec<(&Wish, Question)> =
            wishes.iter().flat_map(|wish| wish.questions().into_iter().map(move |question| (wish, question))).collect();
        let all: Vec<&Question> = questions.iter().map(|(_, question)| question).collect();
        let [first, second] = thread::scope(|scope| {
            [&ours, &peers].map(|court| scope.spawn(|| court.ask_all(&all))).map(|asking| asking.join().unwrap())
        });
        for ((wish, question), (mut first, mut second)) in questions.iter().zip(first.into_iter().zip(second)) {
            for _ in 0..TRIES {
                if agree(wish, question, &first, &second) {
                    break;
                }
                let again = ours.ask(question);
                // The first connections by two addresses at once may part, of which the client then keeps one; and who was silent once
                // may only have been slow.
                if wish.affinity || first.answers.is_empty() {
                    first = again
                } else {
                    first.add(again)
                }
                // What kube-proxy did by connections of a former round, it gets over.
                second = peers.ask(question);
            }
            asked += 1;
            served += usize::from(!first.answers.is_empty());
            if !agree(wish, question, &first, &second) {
                differ.push(format!(
                    "round {round}: {question:?}\n  ours {first:?}\n  kube-proxy {second:?}\n  {wish:?}"
                ));
            }
        }
        wishes.iter_mut().for_each(|wish| wish.change(&mut random));
    }
    println!("{asked} questions, {served} of them answered by a backend");
    assert!(served > asked / 4 && served < asked, "the questions do not tell anything apart");
    assert!(differ.is_empty(), "{} of {asked} differ:\n{}\n{}", differ.len(), differ.join("\n"), ours.drops());
}
