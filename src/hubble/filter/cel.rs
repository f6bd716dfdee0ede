//! Conditions in CEL on the flow, which is called `_flow`: bounded in size, depth and cost, since whoever may ask for
//! flows may send one.
//!
//! A field of a number or text that is not set is 0 or empty; a message that is not set is not there, as `has()` says.
//! What fails (a field of another protocol) does not match.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, LazyLock, Mutex};

use cel::common::ast::{EntryExpr, Expr};
use cel::extractors::This;
use cel::objects::{Key, Map};
use cel::parser::{Expression, PrattParser};
use cel::{Context, Env, Value};
use prost::Message;
use prost_reflect::{DynamicMessage, MapKey, MessageDescriptor, ReflectMessage, Value as Field};
use regex::{Regex, RegexBuilder};

use super::BadFilter;
use crate::hubble::json::descriptor;
use crate::hubble::proto::flow::Flow;

const FIELD: &str = "cel_expression";
/// The flow's name in expressions.
const FLOW: &str = "_flow";
/// Longer expressions are refused.
const BYTES_MAX: usize = 1024;
/// Expressions with more words or signs are refused, or whose parts lie deeper in each other.
const PARTS_MAX: usize = 200;
const DEPTH_MAX: u16 = 24;
/// Choices (`a ? b : c`): each lies in the one before.
const CHOICES_MAX: usize = 8;
/// Loops over lists; each may be inside the one before.
const LOOPS_MAX: usize = 2;
const LOOPS: [&str; 5] = ["all", "exists", "exists_one", "filter", "map"];
/// Patterns that an expression's `matches` keeps ready, and what one may compile to.
const PATTERNS_MAX: usize = 16;
const PATTERN_BYTES_MAX: usize = 64 << 10;

static ENVIRONMENT: LazyLock<Arc<Env>> = LazyLock::new(|| Arc::new(Env::stdlib()));
/// The enums of the package `flow`, by name: `Verdict.DROPPED` is their number.
static ENUMS: LazyLock<Vec<(String, Value)>> = LazyLock::new(enums);

/// A compiled expression.
pub struct Cel {
    expression: Expression,
    /// Fields of the flow that the expression names; `None`: all of them.
    fields: Option<BTreeSet<String>>,
    /// Enums that the expression names.
    enums: Vec<(String, Value)>,
    patterns: Arc<Patterns>,
}

type Patterns = Mutex<HashMap<String, Option<Regex>>>;

impl Cel {
    /// Compiles `source`.
    pub fn new(source: &str) -> Result<Self, BadFilter> {
        let bad = |reason: String| BadFilter { field: FIELD, reason };
        if source.len() > BYTES_MAX {
            return Err(bad(format!("an expression has {BYTES_MAX} bytes at most")));
        }
        if brackets(source) > usize::from(DEPTH_MAX) {
            return Err(bad(format!("brackets lie in each other {DEPTH_MAX} times at most")));
        }
        let words: Vec<&str> = words(source).collect();
        if words.iter().filter(|word| LOOPS.contains(word)).count() > LOOPS_MAX {
            return Err(bad(format!("an expression has {LOOPS_MAX} of {} at most", LOOPS.join(", "))));
        }
        if source.matches('?').count() > CHOICES_MAX {
            return Err(bad(format!("an expression has {CHOICES_MAX} choices at most")));
        }
        // The parser counts what loops become, and no others.
        let is_sign = |letter: &char| letter.is_ascii_punctuation() && *letter != '_';
        if words.len().max(source.chars().filter(is_sign).count()) > PARTS_MAX {
            return Err(bad(format!("an expression has {PARTS_MAX} words and as many signs at most")));
        }
        let parser = PrattParser::new().max_recursion_depth(DEPTH_MAX).max_expression_node_count(PARTS_MAX);
        let expression = parser.parse(source).map_err(|error| bad(error.to_string()))?;
        if depth(&expression) > usize::from(DEPTH_MAX) {
            return Err(bad(format!("an expression's parts lie in each other {DEPTH_MAX} times at most")));
        }
        if words.iter().filter(|word| **word == "matches").count() > PATTERNS_MAX {
            return Err(bad(format!("an expression has {PATTERNS_MAX} patterns at most")));
        }
        if !is_bounded(&expression) {
            return Err(bad("loops go over lists of the flow, and patterns are plain texts".to_owned()));
        }
        let fields = fields(source);
        let unknown = |name: &&String| descriptor::<Flow>().get_field_by_name(name).is_none();
        if let Some(name) = fields.iter().flatten().find(unknown) {
            return Err(bad(format!("a flow has no field {name}")));
        }
        let enums = ENUMS.iter().filter(|(name, _)| words.contains(&name.as_str())).cloned().collect();
        Ok(Self { expression, fields, enums, patterns: Arc::default() })
    }

    /// True if the expression is true of the flow.
    pub fn matches(&self, flow: &Flow) -> bool {
        let Ok(message) = DynamicMessage::decode(descriptor::<Flow>(), flow.encode_to_vec().as_slice())
        else {
            return false;
        };
        let mut context = Context::with_env(ENVIRONMENT.clone());
        context.add_variable_from_value(FLOW, value_of(&message, self.fields.as_ref()));
        for (name, numbers) in &self.enums {
            context.add_variable_from_value(name.clone(), numbers.clone());
        }
        let patterns = self.patterns.clone();
        let matches =
            move |This(text): This<Arc<String>>, pattern: Arc<String>| is_match(&patterns, &text, &pattern);
        context.add_function("matches", matches).is_ok()
            && matches!(context.resolve(&self.expression), Ok(Value::Bool(true)))
    }
}

/// How deep an expression's parts lie in each other: evaluating goes as deep, on the stack.
fn depth(expression: &Expression) -> usize {
    let (mut open, mut most) = (vec![(expression, 1)], 0);
    while let Some((part, depth)) = open.pop() {
        most = most.max(depth);
        open.extend(inner(part).into_iter().map(|part| (part, depth + 1)));
    }
    most
}

/// The parts of an expression.
fn inner(part: &Expression) -> Vec<&Expression> {
    match &part.expr {
        Expr::Call(call) => call.target.as_deref().into_iter().chain(&call.args).collect(),
        Expr::Comprehension(all) => {
            vec![&all.iter_range, &all.accu_init, &all.loop_cond, &all.loop_step, &all.result]
        }
        Expr::List(list) => list.elements.iter().collect(),
        Expr::Map(map) => map.entries.iter().flat_map(|entry| entry_parts(&entry.expr)).collect(),
        Expr::Struct(of) => of.entries.iter().flat_map(|entry| entry_parts(&entry.expr)).collect(),
        Expr::Select(select) => vec![&select.operand],
        Expr::Unspecified | Expr::Ident(_) | Expr::Literal(_) => Vec::new(),
    }
}

/// The flow says how long its lists are, not the expression; and a pattern is compiled once, not for each flow.
fn is_bounded(expression: &Expression) -> bool {
    let mut open = vec![expression];
    while let Some(part) = open.pop() {
        let is_fine = match &part.expr {
            Expr::Comprehension(all) => matches!(all.iter_range.expr, Expr::Ident(_) | Expr::Select(_)),
            Expr::Call(call) if call.func_name == "matches" => {
                call.args.last().is_some_and(|pattern| matches!(pattern.expr, Expr::Literal(_)))
            }
            _ => true,
        };
        if !is_fine {
            return false;
        }
        open.extend(inner(part));
    }
    true
}

fn entry_parts(entry: &EntryExpr) -> Vec<&Expression> {
    match entry {
        EntryExpr::StructField(field) => vec![&field.value],
        EntryExpr::MapEntry(pair) => vec![&pair.key, &pair.value],
    }
}

/// How many brackets lie in each other at most; those in quotes count, too.
fn brackets(source: &str) -> usize {
    let (mut depth, mut most) = (0_usize, 0);
    for letter in source.chars() {
        match letter {
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        most = most.max(depth);
    }
    most
}

/// A pattern that is none, or too large, matches nothing.
fn is_match(patterns: &Patterns, text: &str, pattern: &str) -> bool {
    let mut patterns = patterns.lock().expect("nobody panics while it holds the patterns");
    if !patterns.contains_key(pattern) {
        if patterns.len() >= PATTERNS_MAX {
            patterns.clear();
        }
        let compiled = RegexBuilder::new(pattern).size_limit(PATTERN_BYTES_MAX).build().ok();
        patterns.insert(pattern.to_owned(), compiled);
    }
    patterns.get(pattern).and_then(Option::as_ref).is_some_and(|pattern| pattern.is_match(text))
}

/// Names and words of an expression; those in quotes, too.
fn words(source: &str) -> impl Iterator<Item = &str> {
    source
        .split(|letter: char| !letter.is_ascii_alphanumeric() && letter != '_')
        .filter(|word| !word.is_empty())
}

/// The fields of the flow that the expression names; `None` where it uses the flow in another way.
fn fields(source: &str) -> Option<BTreeSet<String>> {
    let field = |rest: &str| words(rest.strip_prefix('.')?).next().map(str::to_owned);
    source.split(FLOW).skip(1).map(field).collect()
}

fn value_of(message: &DynamicMessage, wanted: Option<&BTreeSet<String>>) -> Value {
    let mut map = HashMap::new();
    for field in message.descriptor().fields() {
        let is_wanted = wanted.is_none_or(|wanted| wanted.contains(field.name()));
        // Of a message, and of one of several, it counts whether it is there.
        if is_wanted && (!field.supports_presence() || message.has_field(&field)) {
            let key = Key::String(Arc::new(field.name().to_owned()));
            map.insert(key, value(&message.get_field(&field)));
        }
    }
    Value::Map(Map { map: Arc::new(map) })
}

fn value(field: &Field) -> Value {
    match field {
        Field::Bool(bool) => Value::Bool(*bool),
        Field::I32(number) | Field::EnumNumber(number) => Value::Int(i64::from(*number)),
        Field::I64(number) => Value::Int(*number),
        Field::U32(number) => Value::UInt(u64::from(*number)),
        Field::U64(number) => Value::UInt(*number),
        Field::F32(number) => Value::Float(f64::from(*number)),
        Field::F64(number) => Value::Float(*number),
        Field::String(text) => Value::String(Arc::new(text.clone())),
        Field::Bytes(bytes) => Value::Bytes(Arc::new(bytes.to_vec())),
        Field::Message(message) => value_of(message, None),
        Field::List(list) => Value::List(Arc::new(list.iter().map(value).collect())),
        Field::Map(map) => {
            let entries = map.iter().map(|(key, field)| (key_of(key), value(field)));
            Value::Map(Map { map: Arc::new(entries.collect()) })
        }
    }
}

fn key_of(key: &MapKey) -> Key {
    match key {
        MapKey::Bool(bool) => Key::Bool(*bool),
        MapKey::I32(number) => Key::Int(i64::from(*number)),
        MapKey::I64(number) => Key::Int(*number),
        MapKey::U32(number) => Key::Uint(u64::from(*number)),
        MapKey::U64(number) => Key::Uint(*number),
        MapKey::String(text) => Key::String(Arc::new(text.clone())),
    }
}

fn enums() -> Vec<(String, Value)> {
    let flow: MessageDescriptor = descriptor::<Flow>();
    let pool = flow.parent_pool();
    let ours = pool.all_enums().filter(|one| one.package_name() == "flow" && one.parent_message().is_none());
    let mut all = Vec::new();
    for one in ours {
        let number = |value: prost_reflect::EnumValueDescriptor| {
            (Key::String(Arc::new(value.name().to_owned())), Value::Int(i64::from(value.number())))
        };
        let numbers = Map { map: Arc::new(one.values().map(number).collect()) };
        all.push((one.name().to_owned(), Value::Map(numbers)));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::tests::{dropped, forwarded};
    use crate::hubble::tests::flow;

    fn shown(source: &str) -> [bool; 2] {
        let cel = Cel::new(source).unwrap_or_else(|error| panic!("{source}: {error}"));
        [forwarded(), dropped()].map(|event| cel.matches(&flow(&event)))
    }

    #[test]
    fn expressions_are_true_of_flows() {
        for (source, expected) in [
            ("true", [true, true]),
            ("_flow.source.identity == 256u", [true, false]),
            ("_flow.source.identity == 256", [true, false]),
            ("_flow.verdict == Verdict.DROPPED", [false, true]),
            ("_flow.l4.TCP.destination_port > 8000u && _flow.l4.TCP.destination_port < 9000u", [true, true]),
            ("_flow.l4.UDP.destination_port == 53u", [false, false]),
            ("has(_flow.l4.UDP) || _flow.source.namespace == 'shop'", [true, false]),
            ("_flow.source.labels.exists(label, label == 'reserved:world')", [false, true]),
            ("_flow.source.labels.exists(label, label.contains('app=front'))", [true, false]),
            ("_flow.destination.pod_name.matches('^back.*[0-9]$')", [true, true]),
            ("_flow.destination.pod_name.startsWith('front')", [false, false]),
            ("_flow.node_name in ['a', 'b']", [true, true]),
            ("size(_flow.egress_allowed_by) > 0", [true, false]),
            ("_flow.drop_reason_desc == DropReason.POLICY_DENIED", [false, true]),
            ("_flow.is_reply", [false, false]),
            ("_flow['verdict'] == 2", [false, true]),
            ("'text'", [false, false]),
            ("1 / 0 == 1", [false, false]),
        ] {
            assert_eq!(shown(source), expected, "{source}");
        }
    }

    #[test]
    fn what_could_cost_much_is_refused() {
        for source in [
            String::new(),
            "_flow.source.identity ==".to_owned(),
            "_flow.colour == 1".to_owned(),
            "x".repeat(2000),
            format!("{}1{}", "(".repeat(400), ")".repeat(400)),
            format!("{}1{}", "[".repeat(400), "]".repeat(400)),
            vec!["1"; 300].join("+"),
            vec!["1"; 30].join("+"),
            format!("{}true", "true?true:".repeat(20)),
            format!("_flow.source{}", ".source".repeat(30)),
            "[1].map(a, [2].map(b, [3].map(c, a + b + c)))".to_owned(),
            // What a flow costs must not be what the expression says.
            r"[1,2,3].exists(a, [4,5,6].exists(b, 'x'.matches(string(a) + string(b) + '\w{30}')))".to_owned(),
            "_flow.source.pod_name.matches(_flow.source.namespace + '.*')".to_owned(),
            (0..17).map(|n| format!("_flow.uuid.matches('{n}')")).collect::<Vec<_>>().join(" || "),
        ] {
            assert!(Cel::new(&source).is_err(), "{source}");
        }
        // Taken or refused: no stack overflows, neither of this thread nor of a worker.
        let nested = |open: &str, close: &str| format!("{}true{}", open.repeat(20), close.repeat(20));
        for source in [
            format!("{}true", "!".repeat(190)),
            format!("{}true", "!-".repeat(90)),
            format!("{}true", "true?true:".repeat(8)),
            format!("_flow.source{}", ".source".repeat(20)),
            ["1"; 20].join("+"),
            ["true"; 60].join("&&"),
            nested("(", ")"),
            nested("[", "]"),
            nested("{1:", "}"),
            nested("size(", ")"),
        ] {
            if let Ok(cel) = Cel::new(&source) {
                cel.matches(&flow(&forwarded()));
            }
        }
        // A pattern that would compile to megabytes matches nothing, soon.
        let began = std::time::Instant::now();
        assert_eq!(shown("_flow.node_name.matches('(a{1000}){1000}') || true"), [true, true]);
        assert_eq!(shown("_flow.node_name.matches('(a{1000}){1000}')"), [false, false]);
        assert!(began.elapsed().as_secs() < 5);
    }
}
