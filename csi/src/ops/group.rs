//! Snapshots of several volumes at one moment: all are held still, then all are taken, then all let go.

use super::snapshot::{Picture, intent, now};
use super::{Volumes, random};
use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::model::{Group, GroupId, Nonce, Record, Snapshot, SnapshotId};
use crate::request::TakeGroup;
use crate::state::{Intent, Open};

/// A snapshot that is about to be taken.
type Plan = (SnapshotId, Nonce, Open);

impl Volumes {
    /// Takes snapshots of volumes at one moment, or finds those of that name. The caller has the name's guard.
    ///
    /// # Errors
    /// As for a single snapshot; then there is none of the group.
    pub fn take_group(&self, request: &TakeGroup) -> Result<(GroupId, Vec<Snapshot>)> {
        self.settle_groups(&request.name)?;
        let known = self.members(|group| group.name == request.name);
        if let Some(Group { id, .. }) = known.first().and_then(|snapshot| snapshot.group.clone()) {
            let mut has: Vec<_> = known.iter().map(|snapshot| snapshot.volume.clone()).collect();
            has.sort();
            if has == request.volumes {
                return Ok((id, known));
            }
            let list = |ids: &[_]| ids.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            return Err(Error::Exists { name: request.name.clone(), has: list(&has), asked: list(&request.volumes) });
        }
        // In the order of their ids, so that two groups cannot wait for each other; busy ones are refused anyway.
        let _guards = request.volumes.iter().map(|id| self.enter(id)).collect::<Result<Vec<_>>>()?;
        let records = request.volumes.iter().map(|id| self.records.get(id)).collect::<Result<Vec<_>>>()?;
        let members = records
            .iter()
            .map(|record| Ok((record, self.snapshotting(record)?)))
            .collect::<Result<Vec<(&Record, &dyn Backend)>>>()?;
        let _reserved = members
            .iter()
            .map(|(record, backend)| {
                self.promises.reserve(backend.store(), record.size, || self.unclaimed(backend.store()))
            })
            .collect::<Result<Vec<_>>>()?;
        let group = Group { id: GroupId::new(random()?), name: request.name.clone() };
        let whole = self.journal.begin(Intent::Group { id: group.id.clone(), members: members.len() })?;
        match self.take_all(&members, &group) {
            Ok(snapshots) => Ok((group.id, snapshots)),
            Err(error) => {
                if let Err(undo) = self.drop_members(&group.id) {
                    tracing::error!(id = %group.id, %undo, "a group that failed could not be removed; the next start will try");
                    whole.keep();
                }
                Err(error)
            }
        }
    }

    fn take_all(&self, members: &[(&Record, &dyn Backend)], group: &Group) -> Result<Vec<Snapshot>> {
        let mut plans = Vec::with_capacity(members.len());
        for (record, _) in members {
            let (id, nonce) = (SnapshotId::new(random()?), Nonce::new(random()?));
            let open = self.journal.begin(intent(&id, &nonce, record))?;
            plans.push((id, nonce, open));
        }
        let taken = self.pictures(members, &plans.iter().map(|(id, nonce, _)| (id, nonce)).collect::<Vec<_>>());
        let (at, inodes) = match taken {
            Ok(taken) => taken,
            Err(error) => {
                for (plan, (_, backend)) in plans.into_iter().zip(members) {
                    self.undo_plan(*backend, plan);
                }
                return Err(error);
            }
        };
        // After the first that fails none counts: those before it have records, by which they are removed.
        let mut outcome = Ok(Vec::with_capacity(members.len()));
        for ((plan, inode), (record, backend)) in plans.into_iter().zip(inodes).zip(members) {
            let Ok(snapshots) = &mut outcome else {
                self.undo_plan(*backend, plan);
                continue;
            };
            let (id, nonce, _) = &plan;
            let name = format!("{}/{}", group.name, record.id);
            let picture = Picture { id: id.clone(), nonce: nonce.clone(), inode };
            match self.keep(record, picture, name, at, Some(group.clone())) {
                Ok(snapshot) => snapshots.push(snapshot),
                Err(error) => {
                    self.undo_plan(*backend, plan);
                    outcome = Err(error);
                }
            }
        }
        outcome
    }

    fn undo_plan(&self, backend: &dyn Backend, (id, nonce, open): Plan) {
        if let Err(undo) = self.undo_take(backend, &id, &nonce) {
            tracing::error!(%id, %undo, "a snapshot that failed could not be removed; the next start will try");
            open.keep();
        }
    }

    /// Removes what is left of groups of this name that failed, and could not be removed then. The caller has its guard.
    fn settle_groups(&self, name: &str) -> Result<()> {
        let mut ids: Vec<_> = self.members(|group| group.name == name).into_iter().filter_map(|it| it.group).collect();
        ids.dedup_by(|one, other| one.id == other.id);
        for group in ids {
            for intent in self.journal.open_ones(|it| matches!(it, Intent::Group { id, .. } if *id == group.id)) {
                self.drop_members(&group.id)?;
                self.journal.settle(&intent);
            }
        }
        Ok(())
    }

    /// Takes all while all are held still.
    fn pictures(
        &self,
        members: &[(&Record, &dyn Backend)],
        plans: &[(&SnapshotId, &Nonce)],
    ) -> Result<(u64, Vec<u64>)> {
        let holds = members
            .iter()
            .map(|(record, backend)| self.hold(record, *backend, members.len() == 1))
            .collect::<Result<Vec<_>>>()?;
        let at = now();
        let go_on = || holds.iter().try_for_each(|hold| hold.go_on());
        let inodes = members
            .iter()
            .zip(plans)
            .map(|((record, backend), (id, nonce))| backend.snapshot(record, id, nonce, &go_on))
            .collect::<Result<Vec<_>>>()?;
        holds.into_iter().try_for_each(|hold| hold.release())?;
        Ok((at, inodes))
    }

    fn members(&self, wanted: impl Fn(&Group) -> bool) -> Vec<Snapshot> {
        let mut all = self.snapshots.all();
        all.retain(|snapshot| snapshot.group.as_ref().is_some_and(&wanted));
        all.sort_by_key(|snapshot| snapshot.seq);
        all
    }

    /// The snapshots of a group. Those that the caller names have to be they, all of them.
    ///
    /// # Errors
    /// [`Error::NoSuchGroup`], [`Error::Invalid`].
    pub fn group(&self, id: &GroupId, named: &[SnapshotId]) -> Result<Vec<Snapshot>> {
        self.group_of(id, named, |_| false)
    }

    /// As [`Volumes::group`]; what is `gone` need not be there.
    fn group_of(
        &self,
        id: &GroupId,
        named: &[SnapshotId],
        gone: impl Fn(&SnapshotId) -> bool,
    ) -> Result<Vec<Snapshot>> {
        let members = self.members(|group| group.id == *id);
        if members.is_empty() {
            return Err(Error::NoSuchGroup { id: id.to_string() });
        }
        let mismatch = |value: String, expected: String| Err(Error::Invalid { field: "snapshot_ids", value, expected });
        for name in named {
            if !members.iter().any(|member| member.id == *name) && !gone(name) {
                return mismatch(name.to_string(), format!("of group {id}"));
            }
        }
        match members.iter().find(|member| !named.contains(&member.id)) {
            Some(member) => mismatch("a list without it".into(), format!("all of group {id}, also {}", member.id)),
            None => Ok(members),
        }
    }

    /// Removes a group and its snapshots. One that is not there was removed before.
    ///
    /// # Errors
    /// As [`Volumes::group`], and as for a single snapshot.
    pub fn drop_group(&self, id: &GroupId, named: &[SnapshotId]) -> Result<()> {
        // Some may have been removed by a call that then failed.
        match self.group_of(id, named, |name| self.snapshots.find(name).is_none()) {
            Err(Error::NoSuchGroup { .. }) => return Ok(()),
            other => other?,
        };
        let _whole = self.journal.begin(Intent::DeleteGroup { id: id.clone() })?;
        self.drop_members(id)
    }

    /// How many snapshots of a group there are.
    pub(super) fn count(&self, id: &GroupId) -> usize {
        self.members(|group| group.id == *id).len()
    }

    pub(super) fn drop_members(&self, id: &GroupId) -> Result<()> {
        self.members(|group| group.id == *id).iter().try_for_each(|snapshot| self.remove_snapshot(snapshot))
    }
}
