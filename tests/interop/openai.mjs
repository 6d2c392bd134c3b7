// The unmodified openai client for Node at a gateway: `node openai.mjs URL KEY SCENARIO` prints what it saw as JSON.
import OpenAI from "openai";

const [baseURL, apiKey, scenario] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0, timeout: 30_000 });
const ask = [{ role: "user", content: "What is the weather in Rome?" }];
const base = { model: "tiny", messages: ask, max_tokens: 200, seed: 5 };
const tool = {
  type: "function",
  function: {
    name: "get_weather",
    parameters: {
      type: "object",
      properties: { city: { enum: ["Oslo", "Rome"] } },
      required: ["city"],
      additionalProperties: false,
    },
  },
};

async function fails(promise) {
  try {
    await promise;
  } catch (error) {
    return { kind: error.constructor.name, status: error.status, code: error.code, param: error.param, type: error.type, request: !!error.requestID };
  }
  return null;
}

const scenarios = {
  async models() {
    const listed = [];
    for await (const model of client.models.list()) listed.push(model.id);
    return { listed, one: (await client.models.retrieve(listed[0])).id };
  },
  async chat() {
    const answer = await client.chat.completions.create({ ...base, max_tokens: 8, min_tokens: 8, temperature: 0 });
    const again = await client.chat.completions.create({ ...base, max_tokens: 8, min_tokens: 8, temperature: 0 });
    const same = answer.choices[0].message.content === again.choices[0].message.content;
    return { role: answer.choices[0].message.role, reason: answer.choices[0].finish_reason, usage: answer.usage, same };
  },
  async stream() {
    const asked = { ...base, max_tokens: 8, min_tokens: 8, stream: true, stream_options: { include_usage: true } };
    const chunks = [];
    for await (const chunk of await client.chat.completions.create(asked)) chunks.push(chunk);
    const helper = client.chat.completions.stream({ ...base, max_tokens: 8, min_tokens: 8 });
    const final = await helper.finalChatCompletion();
    return {
      first: chunks[0].choices[0].delta.role,
      text: chunks.map((chunk) => chunk.choices[0]?.delta?.content ?? "").join(""),
      reason: chunks.at(-2).choices[0].finish_reason,
      usage: chunks.at(-1).usage,
      helped: final.choices[0].message.content,
    };
  },
  async leaves() {
    const stream = await client.chat.completions.create({ ...base, stream: true });
    for await (const _ of stream) break; // which aborts the request
    return { aborted: stream.controller.signal.aborted };
  },
  async tools() {
    const answer = await client.chat.completions.create({ ...base, tools: [tool], tool_choice: "required" });
    const message = answer.choices[0].message;
    const stream = client.chat.completions.stream({ ...base, tools: [tool], tool_choice: "required" });
    const streamed = (await stream.finalChatCompletion()).choices[0].message;
    const results = message.tool_calls.map((call) => ({ role: "tool", tool_call_id: call.id, content: "sunny" }));
    const next = await client.chat.completions.create({ ...base, max_tokens: 4, messages: [...ask, message, ...results] });
    const calls = (given) => given.tool_calls.map((call) => [call.function.name, JSON.parse(call.function.arguments)]);
    return { reason: answer.choices[0].finish_reason, calls: calls(message), streamed: calls(streamed), next: next.choices[0].message.role };
  },
  async schema() {
    const schema = { type: "object", properties: { name: { enum: ["Ada", "Bob"] } }, required: ["name"], additionalProperties: false };
    const response_format = { type: "json_schema", json_schema: { name: "person", strict: true, schema } };
    const answer = await client.chat.completions.parse({ ...base, response_format });
    return { parsed: answer.choices[0].message.parsed };
  },
  async embeddings() {
    const one = await client.embeddings.create({ model: "tiny", input: ["a", "b"] });
    const plain = await client.embeddings.create({ model: "tiny", input: ["a", "b"], encoding_format: "float" });
    const near = one.data[0].embedding.every((value, index) => Math.abs(value - plain.data[0].embedding[index]) < 1e-6);
    return { count: one.data.length, near, usage: one.usage };
  },
  async completions() {
    const asked = { model: "tiny", prompt: "hello", max_tokens: 2, min_tokens: 2, temperature: 0, echo: true, logprobs: 2 };
    const answer = await client.completions.create(asked);
    const { tokens, token_logprobs, top_logprobs, text_offset } = answer.choices[0].logprobs;
    const pieces = [];
    for await (const chunk of await client.completions.create({ ...asked, stream: true })) pieces.push(chunk.choices[0]?.text ?? "");
    return {
      text: answer.choices[0].text, streamed: pieces.join(""), tokens, first: token_logprobs[0], offsets: text_offset,
      rest: token_logprobs.slice(1).every((p) => p < 0), tops: top_logprobs.slice(1).every((top) => Object.keys(top).length >= 2),
    };
  },
  async errors() {
    const stranger = new OpenAI({ baseURL, apiKey: "sk-nobody", maxRetries: 0 });
    return {
      model: await fails(client.chat.completions.create({ ...base, model: "nothing" })),
      key: await fails(stranger.models.list()),
      value: await fails(client.chat.completions.create({ ...base, temperature: 7 })),
      long: await fails(client.chat.completions.create({ ...base, messages: [{ role: "user", content: "x".repeat(9000) }] })),
    };
  },
  async broke() {
    return await fails(client.chat.completions.create({ ...base, max_tokens: 100 }));
  },
  async files() {
    const data = Uint8Array.from({ length: 300_000 }, (_, index) => index % 251);
    const file = await client.files.create({ file: new File([data], "über.bin"), purpose: "user_data" });
    const got = new Uint8Array(await (await client.files.content(file.id)).arrayBuffer());
    const listed = [];
    for await (const each of client.files.list({ limit: 1 })) listed.push(each.id);
    const again = await client.files.retrieve(file.id);
    const removed = await client.files.delete(file.id);
    return {
      file: [file.filename, file.bytes, file.purpose], again: again.id === file.id, listed: listed.includes(file.id),
      same: got.length === data.length && got.every((byte, index) => byte === data[index]),
      removed: removed.deleted, gone: await fails(client.files.retrieve(file.id)),
    };
  },
  async batches() {
    const line = (id, content) => JSON.stringify({
      custom_id: id, method: "POST", url: "/v1/chat/completions",
      body: { model: "tiny", messages: [{ role: "user", content }], max_tokens: 4 },
    });
    const input = new File([[line("a", "one"), line("b", "two")].join("\n")], "input.jsonl");
    const file = await client.files.create({ file: input, purpose: "batch" });
    let batch = await client.batches.create({ input_file_id: file.id, endpoint: "/v1/chat/completions", completion_window: "24h" });
    while (!["completed", "failed", "expired", "cancelled"].includes(batch.status)) {
      await new Promise((done) => setTimeout(done, 100));
      batch = await client.batches.retrieve(batch.id);
    }
    const content = await (await client.files.content(batch.output_file_id)).text();
    const answers = content.trim().split("\n").map((text) => JSON.parse(text));
    const listed = [];
    for await (const each of client.files.list()) listed.push(each.purpose);
    await client.files.delete(file.id);
    return {
      status: batch.status, counts: batch.request_counts, listed: listed.sort(),
      answered: answers.map((each) => [each.custom_id, each.response.status_code, each.response.body.usage.completion_tokens]).sort(),
    };
  },
  async limited() {
    let limited = null;
    for (let turn = 0; turn < 100 && limited === null; turn++) limited = await fails(client.models.list());
    // its own pause before a first retry is half a second at most
    return { limited, after: (await client.models.list({ maxRetries: 1 })).data.length };
  },
  async busy() {
    const answer = await client.chat.completions.create(base, { maxRetries: 1 });
    return { busy: answer.choices[0].message.content };
  },
};

console.log(JSON.stringify(await scenarios[scenario]()));
