// openai-node: thinking, a tool call and its result, JSON by a schema; whole and streamed. usage: chat.mjs BASE
import assert from "node:assert/strict";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "none", maxRetries: 0 });
const model = "oxseek-demo";
const object = properties => ({ type: "object", properties, required: Object.keys(properties), additionalProperties: false });
const city = object({ city: { type: "string" } });
const place = object({ size: { enum: ["small", "big"] }, old: { type: "boolean" } });
const weather = { name: "get_weather", description: "Get the weather of a city.", parameters: city };
const tools = [{ type: "function", function: weather }];
const question = { role: "user", content: "What is the weather in Paris?" };
const checks = [];

/** Whole and streamed answers of one request must say the same. */
async function ask(options) {
  const request = { model, temperature: 0, max_tokens: 200, ...options };
  const whole = (await client.chat.completions.create(request)).choices[0];
  const got = { content: "", reasoning: "", calls: [], reason: null };
  for await (const chunk of await client.chat.completions.create({ ...request, stream: true })) {
    const choice = chunk.choices[0];
    got.content += choice.delta.content ?? "";
    got.reasoning += choice.delta.reasoning_content ?? "";
    for (const call of choice.delta.tool_calls ?? []) {
      const known = (got.calls[call.index] ??= { name: "", arguments: "" });
      known.name += call.function?.name ?? "";
      known.arguments += call.function?.arguments ?? "";
    }
    got.reason = choice.finish_reason ?? got.reason;
  }
  const message = whole.message;
  assert.equal(got.content, message.content ?? "");
  assert.equal(got.reasoning, message.reasoning_content ?? "");
  assert.equal(got.reason, whole.finish_reason);
  const calls = (message.tool_calls ?? []).map(({ function: f }) => ({ name: f.name, arguments: f.arguments }));
  assert.deepEqual(got.calls, calls);
  return whole;
}

function check(name, run) { checks.push([name, run]); }

check("thinking", async () => {
  const messages = [{ role: "user", content: "Tell me a story." }];
  const { message } = await ask({ messages, chat_template_kwargs: { thinking: true } });
  assert.ok(message.reasoning_content, "no reasoning_content");
  assert.ok(!/think>/.test(message.content + message.reasoning_content));
});

check("a tool and its result", async () => {
  const first = await ask({ messages: [question], tools });
  assert.equal(first.finish_reason, "tool_calls");
  const [call] = first.message.tool_calls;
  assert.equal(call.function.name, "get_weather");
  assert.deepEqual(Object.keys(JSON.parse(call.function.arguments)), ["city"]);
  const result = { role: "tool", tool_call_id: call.id, content: "sunny, 25 degrees" };
  const second = await ask({ messages: [question, first.message, result], tools });
  assert.equal(second.finish_reason, "stop");
  assert.ok(second.message.content);
});

check("JSON by a schema", async () => {
  const format = { type: "json_schema", json_schema: { name: "place", schema: place, strict: true } };
  const { message } = await ask({ messages: [{ role: "user", content: "Name a city." }], response_format: format });
  const { size, old, ...rest } = JSON.parse(message.content);
  assert.ok(["small", "big"].includes(size) && typeof old === "boolean");
  assert.deepEqual(rest, {});
});

let failed = 0;
for (const [name, run] of checks) {
  try {
    await run();
    console.log(`ok    openai-node: ${name}`);
  } catch (e) {
    failed++;
    console.log(`FAIL  openai-node: ${name}: ${e.message}`);
  }
}
process.exit(failed ? 1 : 0);
