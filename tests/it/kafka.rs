//! Rules for Kafka on a real node: Kafka's own broker and clients, which know nothing of the proxy between them.

use std::fs;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::lab::{Lab, Pod, Setup, output_of, wait_for};
use crate::require::{require_lab, say_skipped};

const PORT: u16 = 9092;

/// Where `scripts/kafka` has put Kafka.
fn jars() -> Option<PathBuf> {
    let jars = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/kafka/jars");
    jars.is_dir().then_some(jars)
}

/// One of Kafka's programs.
fn program(jars: &Path, class: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new("java");
    command.args(["-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"]);
    command.args(["-Dorg.slf4j.simpleLogger.defaultLogLevel=warn", "-cp"]);
    command.arg(jars.join("*")).arg(class).args(arguments);
    command
}

/// A broker in a pod; it ends with this value.
struct Broker {
    address: String,
    log: PathBuf,
    process: Child,
}

impl Broker {
    fn start(lab: &Lab, jars: &Path, pod: &Pod) -> Result<Self> {
        let directory = lab.directory().join("kafka");
        fs::create_dir_all(&directory)?;
        let address = format!("{}:{PORT}", pod.address(true));
        let settings = directory.join("server.properties");
        fs::write(
            &settings,
            format!(
                "process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:9093
listeners=PLAINTEXT://:{PORT},CONTROLLER://127.0.0.1:9093
advertised.listeners=PLAINTEXT://{address}
controller.listener.names=CONTROLLER
listener.security.protocol.map=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT
log.dirs={}
offsets.topic.replication.factor=1
offsets.topic.num.partitions=1
group.initial.rebalance.delay.ms=0
num.partitions=1
",
                directory.join("data").display()
            ),
        )?;
        let settings = settings.display().to_string();
        let format = ["format", "-t", "MkU3OEVBNTcwNTJENDM2Qk", "-c", &settings];
        output_of(&mut program(jars, "kafka.tools.StorageTool", &format), "")?;
        let log = directory.join("log");
        let output = fs::File::create(&log)?;
        let mut command = program(jars, "kafka.Kafka", &[&settings]);
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        let process = pod.space().run(move || command.spawn()).context("starting Kafka")?;
        Ok(Self { address, log, process })
    }

    /// Waits until it takes connections.
    fn wait(&self, pod: &Pod) -> Result<()> {
        let (own, began) = ((pod.address(true), PORT), Instant::now());
        while pod.space().run(move || TcpStream::connect(own)).is_err() {
            ensure!(began.elapsed() < Duration::from_secs(120), "Kafka does not start: {}", self.said());
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }

    /// The topics that there are, but for Kafka's own; its own pod is asked, which no policy judges.
    fn topics(&self, jars: &Path, pod: &Pod) -> Result<Vec<String>> {
        let bootstrap = format!("127.0.0.1:{PORT}");
        let list = program(
            jars,
            "org.apache.kafka.tools.TopicCommand",
            &["--bootstrap-server", &bootstrap, "--list"],
        );
        let written = pod.space().command(list, "").with_context(|| self.said())?;
        Ok(written.lines().filter(|topic| !topic.starts_with("__")).map(str::to_owned).collect())
    }

    fn said(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        if let Err(error) = self.process.kill().and_then(|()| self.process.wait()) {
            eprintln!("ending Kafka: {error}");
        }
    }
}

/// What a client printed, its errors, too.
fn client(pod: &Pod, mut command: Command, input: &str) -> Result<String> {
    let input = input.to_owned();
    pod.space().run(move || {
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let mut writes = child.stdin.take().context("stdin is piped")?;
        std::io::Write::write_all(&mut writes, input.as_bytes())?;
        drop(writes);
        let output = child.wait_with_output()?;
        Ok(String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
    })
}

fn produce(jars: &Path, broker: &Broker, pod: &Pod, topic: &str, settings: &[&str]) -> Result<String> {
    let mut arguments = vec!["--bootstrap-server", &broker.address, "--topic", topic];
    arguments.extend(settings.iter().flat_map(|setting| ["--producer-property", *setting]));
    client(pod, program(jars, "org.apache.kafka.tools.ConsoleProducer", &arguments), "hello\n")
}

fn consume(jars: &Path, broker: &Broker, pod: &Pod, topic: &str) -> Result<String> {
    let arguments = [
        "--bootstrap-server",
        &broker.address,
        "--topic",
        topic,
        "--from-beginning",
        "--max-messages",
        "1",
        "--timeout-ms",
        "15000",
    ];
    client(pod, program(jars, "org.apache.kafka.tools.consumer.ConsoleConsumer", &arguments), "")
}

#[test]
fn topics_are_produced_and_consumed_by_whom_a_rule_lets() -> Result<()> {
    require_lab!();
    let Some(jars) = jars() else {
        say_skipped("needs Kafka: scripts/kafka brings it");
        return Ok(());
    };
    let lab = Lab::start(Setup::default())?;
    let pod = lab.pod(1, "shop/kafka").label("app", "kafka").create()?;
    let writer = lab.pod(1, "shop/writer").label("app", "writer").create()?;
    let reader = lab.pod(1, "shop/reader").label("app", "reader").create()?;
    let rule = |app: &str, role: &str| {
        format!(
            "  - fromEndpoints: [{{matchLabels: {{app: {app}}}}}]
    toPorts: [{{ports: [{{port: '{PORT}', protocol: TCP}}], rules: {{kafka: [{{role: {role}, topic: orders}}]}}}}]
"
        )
    };
    lab.manifests().apply(&format!(
        "apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {{name: kafka, namespace: shop}}
spec:
  endpointSelector: {{matchLabels: {{app: kafka}}}}
  ingress:
{}{}",
        rule("writer", "produce"),
        rule("reader", "consume")
    ))?;
    wait_for("the policy to be in force", || {
        Ok(lab.node(1).weir(&["policy", "list"])?.contains("kafka") && lab.node(1).proxy_pid().is_some())
    })?;
    let broker = Broker::start(&lab, &jars, &pod)?;
    broker.wait(&pod)?;

    let written = produce(&jars, &broker, &writer, "orders", &[])?;
    ensure!(!written.contains("ERROR"), "{written}");
    let read = consume(&jars, &broker, &reader, "orders")?;
    ensure!(read.contains("hello") && read.contains("Processed a total of 1 messages"), "{read}");
    // Without a number of its own the producer's first request is the one that names the topic.
    let plain = [
        "enable.idempotence=false",
        "max.block.ms=15000",
        "delivery.timeout.ms=20000",
        "request.timeout.ms=10000",
    ];
    for (what, said) in [
        ("another topic", produce(&jars, &broker, &writer, "secrets", &plain)?),
        ("a reader that writes", produce(&jars, &broker, &reader, "orders", &plain)?),
    ] {
        let is_denied = ["TOPIC_AUTHORIZATION_FAILED", "TopicAuthorizationException"];
        ensure!(is_denied.iter().any(|text| said.contains(text)), "{what}: {said}");
    }
    let said = consume(&jars, &broker, &writer, "orders")?;
    ensure!(said.contains("Processed a total of 0 messages"), "a writer that reads: {said}");
    let topics = broker.topics(&jars, &pod)?;
    ensure!(topics == ["orders"], "{topics:?}");
    let metric = |verdict: &str| {
        let labels = ["protocol=\"kafka\"", &format!("verdict=\"{verdict}\"")];
        lab.node(1).metric("weir_proxy_requests_total", &labels)
    };
    wait_for("requests to be counted", || Ok(metric("forwarded")? > 0.0 && metric("denied")? >= 3.0))
}
