//! Requests of Kafka: who asks for what, and of which topics.

use std::collections::BTreeSet;

use super::wire::Reader;

pub const PRODUCE: i16 = 0;
pub const FETCH: i16 = 1;
pub const LIST_OFFSETS: i16 = 2;
pub const METADATA: i16 = 3;
pub const OFFSET_COMMIT: i16 = 8;
pub const OFFSET_FETCH: i16 = 9;
pub const API_VERSIONS: i16 = 18;
pub const CREATE_TOPICS: i16 = 19;
pub const DELETE_TOPICS: i16 = 20;
const DELETE_RECORDS: i16 = 21;
const OFFSET_FOR_LEADER_EPOCH: i16 = 23;
const ADD_PARTITIONS_TO_TXN: i16 = 24;
const TXN_OFFSET_COMMIT: i16 = 28;
const CREATE_PARTITIONS: i16 = 37;
const OFFSET_DELETE: i16 = 47;
const DESCRIBE_TOPIC_PARTITIONS: i16 = 75;

/// APIs whose requests name topics: the newest version that is read here, and the first flexible one.
const WITH_TOPICS: &[(i16, i16, i16)] = &[
    (PRODUCE, 12, 9),
    (FETCH, 12, 12),
    (LIST_OFFSETS, 9, 6),
    (METADATA, 12, 9),
    (OFFSET_COMMIT, 9, 8),
    (OFFSET_FETCH, 9, 6),
    (CREATE_TOPICS, 7, 5),
    (DELETE_TOPICS, 6, 4),
    (DELETE_RECORDS, 2, 2),
    (OFFSET_FOR_LEADER_EPOCH, 4, 4),
    (ADD_PARTITIONS_TO_TXN, 3, 3),
    (TXN_OFFSET_COMMIT, 3, 3),
    (CREATE_PARTITIONS, 3, 2),
    (OFFSET_DELETE, 0, i16::MAX),
    (DESCRIBE_TOPIC_PARTITIONS, 0, 0),
];

/// APIs without topics: coordinators, groups, authentication, versions, the cluster. Anything else may name topics
/// in a way that is not read here.
const WITHOUT_TOPICS: &[i16] =
    &[10, 11, 12, 13, 14, 15, 16, 17, API_VERSIONS, 22, 25, 26, 36, 42, 50, 60, 69];

/// A request that is not Produce has at most so many bytes.
const READ_MAX: usize = 1 << 20;

/// A topic with the partitions that are named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Topic {
    pub name: String,
    pub partitions: Vec<i32>,
}

/// The topics of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Topics {
    /// These; none stands for all where the API has it so.
    Known(Vec<Topic>),
    /// The API has none.
    None,
    /// It may have some.
    Unknown,
}

/// A request, as far as rules ask.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    pub api_key: i16,
    pub api_version: i16,
    pub correlation_id: i32,
    pub client_id: String,
    pub topics: Topics,
    /// Where offsets belong, of OffsetFetch from version 8 on.
    pub groups: Vec<(String, Vec<Topic>)>,
    /// A producer may want no answer.
    pub is_answered: bool,
    session_epoch: i32,
    is_flexible: bool,
}

impl Request {
    /// Reads a request without its length; `None`: it is none of Kafka.
    pub fn read(bytes: &[u8]) -> Option<Self> {
        let mut reader = Reader::new(bytes);
        let (api_key, api_version, correlation_id) = (reader.i16()?, reader.i16()?, reader.i32()?);
        if !(0..=1000).contains(&api_key) || !(0..=100).contains(&api_version) {
            return None;
        }
        // Records are long, and nothing else: what is read into memory many times over is short.
        if api_key != PRODUCE && bytes.len() > READ_MAX {
            return None;
        }
        let client_id = reader.nullable_string()?.unwrap_or_default();
        let known = WITH_TOPICS.iter().find(|(key, _, _)| *key == api_key);
        let topics = if WITHOUT_TOPICS.contains(&api_key) { Topics::None } else { Topics::Unknown };
        let mut request = Self {
            api_key,
            api_version,
            correlation_id,
            client_id,
            topics,
            groups: Vec::new(),
            is_answered: true,
            session_epoch: 0,
            is_flexible: known.is_some_and(|(_, _, first)| api_version >= *first),
        };
        let Some((_, newest, _)) = known else { return Some(request) };
        let mut reader = reader.flexible(request.is_flexible);
        if api_version > *newest {
            // Nobody was told of this version.
            return Some(request);
        }
        reader.tags()?;
        let topics = request.read_topics(&mut reader)?;
        // Bytes that are left over were read by another form than the broker's.
        reader.is_empty().then_some(())?;
        if request.groups.is_empty() {
            request.topics = Topics::Known(topics);
        } else {
            let all = request.groups.iter().flat_map(|(_, topics)| topics.clone());
            request.topics = Topics::Known(all.collect());
        }
        Some(request)
    }

    /// The names of its topics.
    pub fn names(&self) -> BTreeSet<String> {
        match &self.topics {
            Topics::Known(topics) => topics.iter().map(|topic| topic.name.clone()).collect(),
            Topics::None | Topics::Unknown => BTreeSet::new(),
        }
    }

    pub fn is_flexible(&self) -> bool {
        self.is_flexible
    }

    pub fn is_fetch(&self) -> bool {
        self.api_key == FETCH
    }

    /// A fetch that names only what is new since the last one of its session.
    pub fn goes_on_with_session(&self) -> bool {
        self.is_fetch() && self.session_epoch > 0
    }

    fn read_topics(&mut self, reader: &mut Reader<'_>) -> Option<Vec<Topic>> {
        match self.api_key {
            PRODUCE => self.read_produce(reader),
            FETCH => self.read_fetch(reader),
            METADATA => read_metadata(reader, self.api_version),
            OFFSET_FETCH => self.read_offset_fetch(reader),
            CREATE_TOPICS => read_create_topics(reader, self.api_version),
            DELETE_TOPICS => read_delete_topics(reader, self.api_version),
            _ => read_others(reader, self.api_key, self.api_version),
        }
    }

    fn read_produce(&mut self, reader: &mut Reader<'_>) -> Option<Vec<Topic>> {
        if self.api_version >= 3 {
            reader.nullable_string()?;
        }
        self.is_answered = reader.i16()? != 0;
        reader.i32()?;
        let topics = topics_of(reader, |reader| {
            let partition = reader.i32()?;
            reader.bytes()?;
            Some(partition)
        })?;
        reader.tags()?;
        topics
    }

    fn read_fetch(&mut self, reader: &mut Reader<'_>) -> Option<Vec<Topic>> {
        let version = self.api_version;
        // Replica, longest wait, fewest bytes; then most bytes, isolation.
        reader.skip(12 + if version >= 3 { 4 } else { 0 } + if version >= 4 { 1 } else { 0 })?;
        if version >= 7 {
            reader.i32()?;
            self.session_epoch = reader.i32()?;
        }
        let topics = topics_of(reader, |reader| {
            let partition = reader.i32()?;
            // Leader's epoch, offset, last epoch, first offset, most bytes.
            let epochs = if version >= 9 { 4 } else { 0 } + if version >= 12 { 4 } else { 0 };
            reader.skip(12 + epochs + if version >= 5 { 8 } else { 0 })?;
            Some(partition)
        })?;
        if version >= 7 {
            numbered_topics(reader)?;
        }
        if version >= 11 {
            reader.string()?;
        }
        reader.tags()?;
        topics
    }

    fn read_offset_fetch(&mut self, reader: &mut Reader<'_>) -> Option<Vec<Topic>> {
        if self.api_version < 8 {
            reader.string()?;
            let topics = numbered_topics(reader)?;
            if self.api_version >= 7 {
                reader.skip(1)?;
            }
            reader.tags()?;
            return Some(topics.unwrap_or_default());
        }
        let has_member = self.api_version >= 9;
        self.groups = reader.array(|reader| {
            let group = reader.string()?;
            if has_member {
                reader.nullable_string()?;
                reader.i32()?;
            }
            let topics = numbered_topics(reader)?;
            reader.tags()?;
            Some((group, topics.unwrap_or_default()))
        })??;
        reader.skip(1)?;
        reader.tags()?;
        Some(Vec::new())
    }
}

/// Topics whose partitions have more than their number.
fn topics_of(
    reader: &mut Reader<'_>,
    mut partition: impl FnMut(&mut Reader<'_>) -> Option<i32>,
) -> Option<Option<Vec<Topic>>> {
    reader.array(|reader| {
        let name = reader.string()?;
        let partitions = reader.array(|reader| {
            let number = partition(reader)?;
            reader.tags()?;
            Some(number)
        })?;
        reader.tags()?;
        Some(Topic { name, partitions: partitions.unwrap_or_default() })
    })
}

/// Topics whose partitions are numbers.
fn numbered_topics(reader: &mut Reader<'_>) -> Option<Option<Vec<Topic>>> {
    reader.array(|reader| {
        let name = reader.string()?;
        let partitions = reader.array(|reader| reader.i32())?;
        reader.tags()?;
        Some(Topic { name, partitions: partitions.unwrap_or_default() })
    })
}

fn named(name: String) -> Topic {
    Topic { name, partitions: Vec::new() }
}

fn read_metadata(reader: &mut Reader<'_>, version: i16) -> Option<Vec<Topic>> {
    let topics = reader.array(|reader| {
        let id = if version >= 10 { reader.skip(16)? } else { &[] };
        // A topic by its id alone could be any.
        let name = reader.nullable_string()?.filter(|_| id.iter().all(|byte| *byte == 0))?;
        reader.tags()?;
        Some(named(name))
    })?;
    // Whether topics are made; what may be done with the cluster, and with topics.
    let flags = match version {
        ..=3 => 0,
        4..=7 => 1,
        8..=10 => 3,
        _ => 2,
    };
    reader.skip(flags)?;
    reader.tags()?;
    Some(topics.unwrap_or_default())
}

fn read_create_topics(reader: &mut Reader<'_>, version: i16) -> Option<Vec<Topic>> {
    let topics = reader.array(|reader| {
        let name = reader.string()?;
        reader.skip(6)?;
        reader.array(|reader| {
            reader.i32()?;
            reader.array(|reader| reader.i32())?;
            reader.tags()
        })?;
        reader.array(|reader| {
            reader.string()?;
            reader.nullable_string()?;
            reader.tags()
        })?;
        reader.tags()?;
        Some(named(name))
    })?;
    reader.skip(if version >= 1 { 5 } else { 4 })?;
    reader.tags()?;
    topics
}

fn read_delete_topics(reader: &mut Reader<'_>, version: i16) -> Option<Vec<Topic>> {
    let topics = reader.array(|reader| {
        if version < 6 {
            return reader.string().map(named);
        }
        let name = reader.nullable_string()?;
        let id = reader.skip(16)?;
        reader.tags()?;
        // A topic by its id alone could be any.
        name.filter(|_| id.iter().all(|byte| *byte == 0)).map(named)
    })?;
    reader.i32()?;
    reader.tags()?;
    topics
}

fn read_others(reader: &mut Reader<'_>, api_key: i16, version: i16) -> Option<Vec<Topic>> {
    let topics = match api_key {
        LIST_OFFSETS => {
            reader.skip(if version >= 2 { 5 } else { 4 })?;
            let extra = if version >= 4 { 4 } else { 0 } + if version == 0 { 4 } else { 0 };
            topics_of(reader, |reader| {
                let partition = reader.i32()?;
                reader.skip(8 + extra).map(|_| partition)
            })?
        }
        OFFSET_COMMIT => {
            reader.string()?;
            if version >= 1 {
                reader.i32()?;
                reader.string()?;
            }
            if version >= 7 {
                reader.nullable_string()?;
            }
            if (2..=4).contains(&version) {
                reader.skip(8)?;
            }
            let extra = if version >= 6 { 4 } else { 0 } + if version == 1 { 8 } else { 0 };
            committed(reader, extra)?
        }
        TXN_OFFSET_COMMIT => {
            reader.string()?;
            reader.string()?;
            reader.skip(10)?;
            if version >= 3 {
                reader.i32()?;
                reader.string()?;
                reader.nullable_string()?;
            }
            committed(reader, if version >= 2 { 4 } else { 0 })?
        }
        DELETE_RECORDS => {
            let topics = partitions_with(reader, 8)?;
            reader.i32()?;
            topics
        }
        OFFSET_FOR_LEADER_EPOCH => {
            reader.skip(if version >= 3 { 4 } else { 0 })?;
            partitions_with(reader, if version >= 2 { 8 } else { 4 })?
        }
        ADD_PARTITIONS_TO_TXN => {
            reader.string()?;
            reader.skip(10)?;
            numbered_topics(reader)?
        }
        CREATE_PARTITIONS => {
            let topics = reader.array(|reader| {
                let name = reader.string()?;
                reader.i32()?;
                reader.array(|reader| {
                    reader.array(|reader| reader.i32())?;
                    reader.tags()
                })?;
                reader.tags()?;
                Some(named(name))
            })?;
            reader.skip(5)?;
            topics
        }
        OFFSET_DELETE => {
            reader.string()?;
            topics_of(reader, |reader| reader.i32())?
        }
        DESCRIBE_TOPIC_PARTITIONS => {
            let topics = reader.array(|reader| {
                let name = reader.string()?;
                reader.tags()?;
                Some(named(name))
            })?;
            reader.i32()?;
            // Where to go on: a topic and a partition, or nothing.
            if reader.i8()? != -1 {
                let next = reader.string()?;
                reader.i32()?;
                reader.tags()?;
                topics.map(|mut topics| {
                    topics.push(named(next));
                    topics
                })
            } else {
                topics
            }
        }
        _ => return None,
    };
    reader.tags()?;
    topics
}

/// Topics whose partitions have their number and `more` bytes.
fn partitions_with(reader: &mut Reader<'_>, more: usize) -> Option<Option<Vec<Topic>>> {
    topics_of(reader, |reader| {
        let partition = reader.i32()?;
        reader.skip(more).map(|_| partition)
    })
}

/// Topics whose partitions have an offset, `more` bytes and a text.
fn committed(reader: &mut Reader<'_>, more: usize) -> Option<Option<Vec<Topic>>> {
    topics_of(reader, |reader| {
        let partition = reader.i32()?;
        reader.skip(8 + more)?;
        reader.nullable_string()?;
        Some(partition)
    })
}

/// Lowers the newest versions in an `ApiVersions` answer to those that are read here.
pub fn bound_versions(answer: &mut [u8], version: i16) {
    for (place, newest) in places_of_versions(answer, version).unwrap_or_default() {
        if let Some(bytes) = answer.get_mut(place..place + 2) {
            bytes.copy_from_slice(&newest.to_be_bytes());
        }
    }
}

/// Where versions stand that are too new, and what belongs there.
fn places_of_versions(answer: &[u8], version: i16) -> Option<Vec<(usize, i16)>> {
    // The header of this answer is never flexible: a client does not know yet what a broker can.
    let mut reader = Reader::new(answer);
    reader.i32()?;
    // A broker that does not know the version answers by version 0.
    let error = reader.i16()?;
    let mut reader = reader.flexible(version >= 3 && error == 0);
    let mut places = Vec::new();
    reader.array(|reader| {
        let (key, _) = (reader.i16()?, reader.i16()?);
        let (place, newest) = (reader.place(), reader.i16()?);
        let known = WITH_TOPICS.iter().find(|(known, _, _)| *known == key).map(|(_, newest, _)| *newest);
        places.extend(known.filter(|known| *known < newest).map(|known| (place, known)));
        reader.tags()
    })?;
    Some(places)
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::super::refusal::refusal;
    use super::*;

    /// A head of a known API and version, and any bytes behind it.
    fn request() -> impl Strategy<Value = Vec<u8>> {
        (0_i16..80, 0_i16..16, vec(prop_oneof![0_u8..4, any::<u8>()], 0..200)).prop_map(
            |(api_key, version, rest)| {
                let head = [&api_key.to_be_bytes()[..], &version.to_be_bytes(), &[0, 0, 0, 7, 0, 1, b'c']];
                [head.concat(), rest].concat()
            },
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn no_request_breaks_the_reader(bytes in prop_oneof![4 => request(), 1 => vec(any::<u8>(), 0..300)]) {
            if let Some(request) = Request::read(&bytes) {
                let names: usize = request.names().iter().map(String::len).sum();
                prop_assert!(names <= bytes.len(), "no topic out of nothing");
                let _ = refusal(&request);
            }
        }

        #[test]
        fn no_answer_breaks_what_bounds_versions(mut bytes in vec(any::<u8>(), 0..200), version in 0_i16..5) {
            let before = bytes.len();
            bound_versions(&mut bytes, version);
            prop_assert_eq!(bytes.len(), before);
        }
    }
}
