//! Answers in the broker's place: TOPIC_AUTHORIZATION_FAILED for every topic and partition that was named.

use super::request::{
    CREATE_TOPICS, DELETE_TOPICS, FETCH, LIST_OFFSETS, METADATA, OFFSET_COMMIT, OFFSET_FETCH, PRODUCE,
    Request, Topic, Topics,
};
use super::wire::Writer;

/// The error's number.
pub const TOPIC_AUTHORIZATION_FAILED: i16 = 29;

/// The answer with its length; `None`: for this API there is none, and the connection must end.
pub fn refusal(request: &Request) -> Option<Vec<u8>> {
    let Topics::Known(topics) = &request.topics else { return None };
    let version = request.api_version;
    let mut writer = Writer::new(request.is_flexible());
    writer.i32(request.correlation_id).tags();
    match request.api_key {
        PRODUCE => produce(&mut writer, version, topics),
        FETCH => fetch(&mut writer, version, topics),
        LIST_OFFSETS => list_offsets(&mut writer, version, topics),
        METADATA => metadata(&mut writer, version, topics),
        OFFSET_COMMIT => {
            if version >= 3 {
                writer.i32(0);
            }
            of_partitions(&mut writer, topics, |writer| {
                writer.i16(TOPIC_AUTHORIZATION_FAILED);
            });
        }
        OFFSET_FETCH => offset_fetch(&mut writer, version, request, topics),
        CREATE_TOPICS => created(&mut writer, version, topics),
        DELETE_TOPICS => deleted(&mut writer, version, topics),
        _ => return None,
    }
    writer.tags();
    Some(writer.framed())
}

/// Each topic with its partitions, and for each partition its number and what `write` writes.
fn of_partitions(writer: &mut Writer, topics: &[Topic], mut write: impl FnMut(&mut Writer)) {
    writer.array(topics, |writer, topic| {
        writer.string(&topic.name);
        writer.array(&topic.partitions, |writer, partition| {
            writer.i32(*partition);
            write(writer);
        });
    });
}

fn produce(writer: &mut Writer, version: i16, topics: &[Topic]) {
    of_partitions(writer, topics, |writer| {
        writer.i16(TOPIC_AUTHORIZATION_FAILED).i64(-1);
        if version >= 2 {
            writer.i64(-1);
        }
        if version >= 5 {
            writer.i64(-1);
        }
        if version >= 8 {
            writer.array::<()>(&[], |_, ()| {}).null_string();
        }
    });
    if version >= 1 {
        writer.i32(0);
    }
}

fn fetch(writer: &mut Writer, version: i16, topics: &[Topic]) {
    if version >= 1 {
        writer.i32(0);
    }
    if version >= 7 {
        // No session: the next fetch names everything.
        writer.i16(0).i32(0);
    }
    of_partitions(writer, topics, |writer| {
        writer.i16(TOPIC_AUTHORIZATION_FAILED).i64(-1);
        if version >= 4 {
            writer.i64(-1);
        }
        if version >= 5 {
            writer.i64(-1);
        }
        if version >= 4 {
            writer.null();
        }
        if version >= 11 {
            writer.i32(-1);
        }
        writer.null();
    });
}

fn list_offsets(writer: &mut Writer, version: i16, topics: &[Topic]) {
    if version >= 2 {
        writer.i32(0);
    }
    of_partitions(writer, topics, |writer| {
        writer.i16(TOPIC_AUTHORIZATION_FAILED);
        if version == 0 {
            writer.array::<()>(&[], |_, ()| {});
        } else {
            writer.i64(-1).i64(-1);
        }
        if version >= 4 {
            writer.i32(-1);
        }
    });
}

fn metadata(writer: &mut Writer, version: i16, topics: &[Topic]) {
    if version >= 3 {
        writer.i32(0);
    }
    writer.array::<()>(&[], |_, ()| {});
    if version >= 2 {
        writer.null_string();
    }
    if version >= 1 {
        writer.i32(-1);
    }
    writer.array(topics, |writer, topic| {
        writer.i16(TOPIC_AUTHORIZATION_FAILED).string(&topic.name);
        if version >= 10 {
            writer.raw(&[0; 16]);
        }
        if version >= 1 {
            writer.raw(&[0]);
        }
        writer.array::<()>(&[], |_, ()| {});
        if version >= 8 {
            writer.i32(i32::MIN);
        }
    });
    if (8..=10).contains(&version) {
        writer.i32(i32::MIN);
    }
}

fn offset_fetch(writer: &mut Writer, version: i16, request: &Request, topics: &[Topic]) {
    let partitions = |writer: &mut Writer, topics: &[Topic]| {
        of_partitions(writer, topics, |writer| {
            writer.i64(-1);
            if version >= 5 {
                writer.i32(-1);
            }
            writer.string("").i16(TOPIC_AUTHORIZATION_FAILED);
        });
    };
    if version >= 3 {
        writer.i32(0);
    }
    if version >= 8 {
        writer.array(&request.groups, |writer, (group, topics)| {
            writer.string(group);
            partitions(writer, topics);
            writer.i16(0);
        });
        return;
    }
    partitions(writer, topics);
    if version >= 2 {
        writer.i16(0);
    }
}

fn created(writer: &mut Writer, version: i16, topics: &[Topic]) {
    if version >= 2 {
        writer.i32(0);
    }
    writer.array(topics, |writer, topic| {
        writer.string(&topic.name);
        if version >= 7 {
            writer.raw(&[0; 16]);
        }
        writer.i16(TOPIC_AUTHORIZATION_FAILED);
        if version >= 1 {
            writer.string("Access denied");
        }
        if version >= 5 {
            writer.i32(-1).i16(-1).null();
        }
    });
}

fn deleted(writer: &mut Writer, version: i16, topics: &[Topic]) {
    if version >= 1 {
        writer.i32(0);
    }
    writer.array(topics, |writer, topic| {
        writer.string(&topic.name);
        if version >= 6 {
            writer.raw(&[0; 16]);
        }
        writer.i16(TOPIC_AUTHORIZATION_FAILED);
        if version >= 5 {
            writer.string("Access denied");
        }
    });
}
