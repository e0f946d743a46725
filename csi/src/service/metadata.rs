//! The snapshot metadata service: which blocks of a snapshot hold data, and which changed since another one.

use std::pin::Pin;

use tokio_stream::Stream;
use tonic::{Request, Response, Status};

use super::{Shared, refuse, signed};
use crate::csi::snapshot_metadata_server::SnapshotMetadata;
use crate::csi::{
    BlockMetadata, BlockMetadataType, GetMetadataAllocatedRequest, GetMetadataAllocatedResponse,
    GetMetadataDeltaRequest, GetMetadataDeltaResponse,
};
use crate::error::{Error, Result};
use crate::model::{Range, SnapshotId};
use crate::request::known_snapshot;

/// Ranges in one message, unless the caller wants fewer.
const MOST: usize = 1024;

/// The snapshot metadata service.
#[derive(Clone)]
pub struct MetadataService(pub Shared);

type Answers<T> = Pin<Box<dyn Stream<Item = std::result::Result<T, Status>> + Send>>;

fn snapshot(field: &'static str, id: &str) -> Result<SnapshotId> {
    if id.is_empty() { Err(Error::Missing { field }) } else { known_snapshot(id) }
}

fn offset(value: i64) -> Result<u64> {
    let why = || format!("starting_offset: {value} is negative");
    value.try_into().map_err(|_| Error::OutOfRange { wanted: 0, why: why() })
}

/// The ranges, in messages of at most so many. One without any says that there are none.
fn messages(ranges: Vec<Range>, most: i32) -> Result<Vec<Vec<BlockMetadata>>> {
    let most = match usize::try_from(most) {
        Ok(0) => MOST,
        Ok(most) => most.min(MOST),
        Err(_) => {
            let expected = "at least 0".into();
            return Err(Error::Invalid { field: "max_results", value: most.to_string(), expected });
        }
    };
    let block = |range: &Range| BlockMetadata { byte_offset: signed(range.offset), size_bytes: signed(range.length) };
    if ranges.is_empty() {
        return Ok(vec![Vec::new()]);
    }
    Ok(ranges.chunks(most).map(|chunk| chunk.iter().map(block).collect()).collect())
}

#[tonic::async_trait]
impl SnapshotMetadata for MetadataService {
    type GetMetadataAllocatedStream = Answers<GetMetadataAllocatedResponse>;
    type GetMetadataDeltaStream = Answers<GetMetadataDeltaResponse>;

    async fn get_metadata_allocated(
        &self,
        request: Request<GetMetadataAllocatedRequest>,
    ) -> std::result::Result<Response<Self::GetMetadataAllocatedStream>, Status> {
        let request = request.into_inner();
        let id = snapshot("snapshot_id", &request.snapshot_id).map_err(refuse)?;
        let start = offset(request.starting_offset).map_err(refuse)?;
        let (size, ranges) = self.0.run(None, move |volumes| volumes.allocated(&id, start)).await?;
        let answer = move |block_metadata| {
            Ok(GetMetadataAllocatedResponse {
                block_metadata_type: BlockMetadataType::VariableLength as i32,
                volume_capacity_bytes: signed(size),
                block_metadata,
            })
        };
        let messages = messages(ranges, request.max_results).map_err(refuse)?;
        Ok(Response::new(Box::pin(tokio_stream::iter(messages.into_iter().map(answer)))))
    }

    async fn get_metadata_delta(
        &self,
        request: Request<GetMetadataDeltaRequest>,
    ) -> std::result::Result<Response<Self::GetMetadataDeltaStream>, Status> {
        let request = request.into_inner();
        let base = snapshot("base_snapshot_id", &request.base_snapshot_id).map_err(refuse)?;
        let target = snapshot("target_snapshot_id", &request.target_snapshot_id).map_err(refuse)?;
        let start = offset(request.starting_offset).map_err(refuse)?;
        let (size, ranges) = self.0.run(None, move |volumes| volumes.changed(&base, &target, start)).await?;
        let answer = move |block_metadata| {
            Ok(GetMetadataDeltaResponse {
                block_metadata_type: BlockMetadataType::VariableLength as i32,
                volume_capacity_bytes: signed(size),
                block_metadata,
            })
        };
        let messages = messages(ranges, request.max_results).map_err(refuse)?;
        Ok(Response::new(Box::pin(tokio_stream::iter(messages.into_iter().map(answer)))))
    }
}
